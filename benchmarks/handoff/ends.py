"""The two ends of a handoff, as actors on nodes of their own: KV without a model, and pages for it.

What lies between is the real path: a prompt's memory, cut into parts, packed, stored, fetched,
checked, and copied into the pages of a decode stage.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch

from rayapp.engine.request import GenerationRequest
from rayapp.engine.sequences.memory import KVMemory
from rayapp.engine.sequences.paged_kv import PagedKV
from rayapp.engine.sequences.running import Reservation
from rayapp.kv.growing import PromptKV
from rayapp.kv.landing import land
from rayapp.kv.ledger import KVShape
from rayapp.kv.parts import PartCutter
from rayapp.kv.segment import KVExtent, KVSegment
from rayapp.kv.wire import Envelope, message_sizes, pack
from rayapp.plan import PruningPlan

_RANDOM = 1 << 20


@dataclass(frozen=True)
class Stack:
    """What caches and pages ask of a stack of blocks; there are no weights."""

    shape: KVShape
    plan: PruningPlan
    dtype: torch.dtype = torch.bfloat16

    @property
    def windows(self) -> tuple[int | None, ...]:
        return self.shape.windows

    @property
    def num_blocks(self) -> int:
        return self.shape.num_blocks

    @property
    def num_kv_heads(self) -> int:
        return self.shape.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.shape.head_dim

    @property
    def devices(self) -> list[torch.device]:
        return [torch.device("cpu")] * self.num_blocks

    @property
    def attends(self) -> list[bool]:
        return [self.plan.mode("decode", block).attends for block in range(self.num_blocks)]


class _End:
    def cpu_s(self) -> float:
        """Processor seconds of this process so far."""
        times = psutil.Process(os.getpid()).cpu_times()
        return times.user + times.system


class Sender(_End):
    """The prefill's end: the KV of one prompt, all of it there."""

    def prepare(self, stack: Stack, num_tokens: int, part_tokens: int) -> int:
        """Make random KV, and cut it whole and in parts; return how many parts there are."""
        torch.set_num_threads(1)
        kv = PromptKV(stack, torch.arange(num_tokens))
        extent = KVExtent(num_tokens, num_tokens)
        cutter = PartCutter(stack.plan, stack, extent)
        self._parts: list[KVSegment] = []
        while kv.num_done < num_tokens:
            count = min(part_tokens, num_tokens - kv.num_done)
            for block in range(stack.num_blocks):
                shape = (1, stack.num_kv_heads, count, stack.head_dim)
                kv.append(block, *(torch.randn(shape).to(stack.dtype) for _ in range(2)))
            kv.num_done += count
            part = cutter.cut(kv, least_bytes=0)
            self._parts.append((part or cutter.rest(kv)).segment())
        self._whole = PartCutter(stack.plan, stack, extent).rest(kv).segment()
        return len(self._parts)

    def whole(self) -> Any:
        """The message of all KV."""
        return pack(self._whole, Envelope("r", 0, "p", "w"))

    def part(self, number: int) -> Any:
        """The message of one part."""
        is_last = number == len(self._parts) - 1
        return pack(self._parts[number], Envelope("r", 0, "p", "w", number, is_last))

    def keep(self, num_bytes: int) -> None:
        """Make an array for :meth:`bare`."""
        rng = np.random.default_rng(0)
        self._bare = np.resize(rng.integers(0, 256, _RANDOM).astype(np.uint8), num_bytes)

    def bare(self) -> np.ndarray:
        """As many bytes as a message has, in one array that is there already."""
        return self._bare


class Receiver(_End):
    """The decode's end: pages, and what is copied into them."""

    def prepare(self, stack: Stack, num_tokens: int) -> None:
        """Take the pages of one sequence."""
        torch.set_num_threads(1)
        limit = num_tokens + 16
        pages = PagedKV(stack, stack.plan, max_num_seqs=1, max_model_len=limit, memory=KVMemory())
        extent = KVExtent(num_tokens, num_tokens)
        held = pages.take(extent, [16], 1, is_alone=True)
        prompt = (GenerationRequest("r", tuple(range(num_tokens))),)
        self._reserved = partial(Reservation, prompt, extent, held, pages)
        self._reservation = self._reserved()

    async def load(self, references: list[Any], part: int = 0, is_last: bool = True) -> tuple:
        """Fetch a message, check it and copy it; return its payload and its overhead in bytes."""
        if not part:
            self._reservation = self._reserved()
        message = await references[0]
        envelope = Envelope("r", 0, "p", "w", part, is_last)
        self._reservation.load(land(message, envelope, self._reservation))
        if is_last:
            self._reservation.check_complete()
        sizes = message_sizes(message)
        return sizes.payload_bytes, sizes.overhead_bytes

    async def get(self, references: list[Any]) -> int:
        """Fetch an array; return its bytes."""
        return int((await references[0]).nbytes)
