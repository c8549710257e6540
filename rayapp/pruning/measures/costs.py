"""Costs of each part of each block, per stage: measured once, then added up for any candidate.

One prompt is timed alone; prompt and answer have the calibration set's median lengths. Blocks that
share a sliding window do the same work, so they get the same (mean) cost, and noise never ranks
candidates of one size.
Shapes: B = 1, T = tokens, E = hidden size.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from rayapp.data.lines import TokenizedLine
from rayapp.kv.cache import held_entries
from rayapp.kv.quantize import buffer_sizes
from rayapp.models.healed import Bridge
from rayapp.plan import SEND_ALL, KVTransfer, ModelSignature
from rayapp.pruning.candidates.candidate import ATTENTION, DENSE, MLP, Candidate
from rayapp.pruning.evaluator.block_runner import BlockKVSlot, BlockRunner
from rayapp.pruning.evaluator.calibration import cut
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.evaluator.handoff import Handoff, handoff

RUNS = 5
"""Number of timed runs of each part; the median counts (project default)."""

_Seconds = tuple[float, ...]


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes by block; a token of decode costs one step.

    Attributes:
        prompt_tokens: Number of tokens that prefill was timed on, and that decode attends to.
        answer_tokens: Number of tokens of an answer.
        prefill_parts: Seconds of attention and MLP of every block, numbered as in candidates.
        prefill_kv: Seconds of writing KV alone, by block.
        decode_parts: Seconds of the same parts for one token of decode.
        prefill_rest: Seconds of everything else: embedding, final norm and head.
        decode_rest: Seconds of the same for one token of decode.
        kv_bytes: Bytes of the prompt's KV by block, uncut.
        sent_bytes: Bytes of the same KV under the transfer rules.
        prefill_bridge: Seconds of the linear map of one span in prefill.
        decode_bridge: Seconds of the same for one token of decode.
    """

    prompt_tokens: int
    answer_tokens: int
    prefill_parts: _Seconds
    prefill_kv: _Seconds
    decode_parts: _Seconds
    prefill_rest: float
    decode_rest: float
    kv_bytes: tuple[int, ...]
    sent_bytes: tuple[int, ...]
    prefill_bridge: float = 0.0
    decode_bridge: float = 0.0

    @classmethod
    def loads(cls, text: str) -> Costs:
        """Parse the text that :meth:`dumps` wrote, bit for bit."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in json.loads(text).items()
        }
        return cls(**values)

    def dumps(self) -> str:
        """The costs as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @property
    def num_blocks(self) -> int:
        """Number of the model's blocks."""
        return len(self.kv_bytes)

    def prefill_s(self, candidate: Candidate, num_bridges: int = 0) -> float:
        """Seconds of one prefill, with so many bridges over removed spans."""
        decode = candidate.skips("decode", self.num_blocks)
        prefill = candidate.skips("prefill", self.num_blocks)
        kv = [
            seconds
            for block, seconds in enumerate(self.prefill_kv)
            if prefill[block] & ATTENTION and not decode[block] & ATTENTION
        ]
        bridges = num_bridges * self.prefill_bridge
        kept = _kept(self.prefill_parts, candidate.prefill)
        return math.fsum([self.prefill_rest, bridges, *kept, *kv])

    def decode_s(self, candidate: Candidate, num_bridges: int = 0) -> float:
        """Seconds of one decode step, with so many bridges over removed spans."""
        bridges = num_bridges * self.decode_bridge
        return math.fsum([self.decode_rest, bridges, *_kept(self.decode_parts, candidate.decode)])

    def bytes_sent(self, candidate: Candidate) -> int:
        """Bytes of the KV that one prompt sends, without headers."""
        skips = candidate.skips("decode", self.num_blocks)
        return sum(
            size for size, bits in zip(self.sent_bytes, skips, strict=True) if not bits & ATTENTION
        )

    def total_s(self, candidate: Candidate) -> float:
        """Seconds from the prompt to the last token, without the transfer."""
        return self.prefill_s(candidate) + (self.answer_tokens - 1) * self.decode_s(candidate)

    def expected_s(
        self,
        prefill_remove: float,
        decode_remove: float,
        *,
        kv_modes: bool,
        bridged: bool = False,
    ) -> float:
        """Expected ``total_s`` for given sizes: parts cost their mean.

        With kv modes prefill writes all KV. If spans are ``bridged``, every removed block counts a
        bridge of its own, which is the most that there can be.
        """
        prefill = sum(self.prefill_parts) / self.num_blocks
        decode = sum(self.decode_parts) / self.num_blocks
        written = sum(self.prefill_kv) / self.num_blocks if kv_modes else 0.0
        if bridged:
            written, decode = written + self.prefill_bridge, decode - self.decode_bridge
        saved_s = prefill_remove * max(0.0, prefill - written)
        saved_s += (self.answer_tokens - 1) * decode_remove * decode
        return self.total_s(DENSE) - saved_s


def _kept(parts: _Seconds, removed: tuple[int, ...]) -> list[float]:
    gone = set(removed)
    return [seconds for part, seconds in enumerate(parts) if part not in gone]


@torch.inference_mode()
def measure_costs(evaluator: Evaluator) -> Costs:
    """Time every part of every block on this evaluator's device."""
    runner, calibration = evaluator.runner, evaluator.calibration
    prompt = int(statistics.median(len(line.prompt) for line in calibration.lines))
    answer = int(statistics.median(len(line.continuation) for line in calibration.lines))
    line = TokenizedLine((0,) * prompt, (0, 0), "")  # two continuation tokens: decode runs one
    inputs = handoff(cut([line]).chunks[0], "prefill")
    timed = [_time_block(runner, inputs, block) for block in range(runner.num_blocks)]
    prefill, decode, kv = (_shared(rows, runner.windows) for rows in zip(*timed, strict=True))
    rules, signature = evaluator.objective.kv_transfer, runner.signature
    cached = [held_entries(prompt, window) for window in runner.windows]
    sizes = [_bytes(signature, runner.element_bytes, entries, SEND_ALL) for entries in cached]
    sent = [
        _bytes(signature, runner.element_bytes, entries, rules.get(block, SEND_ALL))
        for block, entries in enumerate(cached)
    ]
    return Costs(
        prompt_tokens=prompt,
        answer_tokens=answer,
        prefill_parts=prefill,
        prefill_kv=kv,
        decode_parts=decode,
        prefill_rest=_time_rest(runner, inputs.prefill_ids_BP),
        decode_rest=_time_rest(runner, inputs.decode_ids_BD),
        kv_bytes=tuple(sizes),
        sent_bytes=tuple(sent),
        prefill_bridge=_time_bridge(runner, inputs.prefill_ids_BP),
        decode_bridge=_time_bridge(runner, inputs.decode_ids_BD),
    )


def _time_block(
    runner: BlockRunner, inputs: Handoff, block: int
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of one block's work: prefill's attention and MLP, decode's, and writing KV."""
    window, device = runner.windows[block], runner.device
    prompt_BPE, token_BDE = runner.embed(inputs.prefill_ids_BP), runner.embed(inputs.decode_ids_BD)
    at_BP, at_BD = inputs.prefill_positions_BP, inputs.decode_positions_BD
    prompt_mask = inputs.prefill_mask(window)
    prompt_mask = None if prompt_mask is None else prompt_mask.to(device)
    token_mask = inputs.decode_mask(SEND_ALL, window).to(device)
    prefix = runner.write_kv(block, prompt_BPE, at_BP)

    def prefill(skipped: int) -> object:
        return runner.run(block, skipped, prompt_BPE, at_BP, prompt_mask, BlockKVSlot())

    def decode(skipped: int) -> object:
        return runner.run(block, skipped, token_BDE, at_BD, token_mask, BlockKVSlot(prefix))

    parts = (MLP, ATTENTION)  # skipping a part times the other one
    return (
        [_seconds(partial(prefill, part), device) for part in parts],
        [_seconds(partial(decode, part), device) for part in parts],
        [_seconds(partial(runner.write_kv, block, prompt_BPE, at_BP), device)],
    )


def _time_rest(runner: BlockRunner, token_ids_BT: torch.Tensor) -> float:
    """Seconds of the work around the blocks, with logits of one token."""
    return _seconds(lambda: runner.logits(runner.embed(token_ids_BT)[:, -1:]), runner.device)


def _time_bridge(runner: BlockRunner, token_ids_BT: torch.Tensor) -> float:
    """Seconds of a linear map of the residual of these tokens."""
    hidden_BTE = runner.embed(token_ids_BT)
    bridge = Bridge(hidden_BTE.shape[-1], epsilon=1e-6).to_empty(device=hidden_BTE.device)
    bridge = bridge.to(hidden_BTE.dtype).requires_grad_(False)
    for parameter in bridge.parameters():
        parameter.zero_()
    return _seconds(lambda: bridge(hidden_BTE), runner.device)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Median seconds of ``RUNS`` runs, after one that warms up."""
    seconds = []
    for _ in range(1 + RUNS):
        _settle(device)
        started = time.perf_counter()
        action()
        _settle(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _shared(rows: Sequence[Sequence[float]], windows: Sequence[int | None]) -> _Seconds:
    """Costs with every block's row replaced by the mean over blocks of its window, in one line."""
    means = {}
    for window in set(windows):
        alike = [row for row, its in zip(rows, windows, strict=True) if its == window]
        means[window] = [statistics.fmean(column) for column in zip(*alike, strict=True)]
    return tuple(seconds for window in windows for seconds in means[window])


def _bytes(
    signature: ModelSignature, element_bytes: int, num_entries: int, rule: KVTransfer
) -> int:
    """Bytes that one block sends of a prompt with ``num_entries`` entries."""
    shape = (signature.num_kv_heads, sum(rule.counts(num_entries)), signature.head_dim)
    return sum(buffer_sizes(rule.encoding, *shape, element_bytes))
