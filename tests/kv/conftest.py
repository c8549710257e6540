"""Random segments, plans and captures: small, and each with its own oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import strategies as st

from rayapp.kv.cache import CaptureCache
from rayapp.kv.segment import BlockKV, KVSegment
from rayapp.kv.wire import Envelope
from rayapp.plan import (
    KVTransfer,
    Mode,
    ModelSignature,
    PruningPlan,
    StagePlan,
)

ATTENDING = (Mode.FULL, Mode.ATTENTION_ONLY)
WRITING = (Mode.FULL, Mode.ATTENTION_ONLY, Mode.MLP_AND_KV, Mode.KV_ONLY)


@st.composite
def transfers(draw: st.DrawFn) -> KVTransfer:
    amount = st.none() | st.integers(0, 20) | st.floats(0.0, 1.0)
    first, last = draw(amount), draw(amount)
    if (first is not None or last is not None) and not (first or last):
        last = 1
    return KVTransfer(
        first=first, last=last, encoding=draw(st.sampled_from(["model", "int8", "int4"]))
    )


@st.composite
def plans(draw: st.DrawFn, num_blocks: int = 5) -> PruningPlan:
    """Valid plans over every mode of both stages, with rules for blocks where decode attends."""
    prefill, decode, rules = {}, {}, {}
    for block in range(num_blocks):
        decode[block] = draw(st.sampled_from([*ATTENDING, *ATTENDING, Mode.MLP_ONLY, Mode.REMOVED]))
        attends = decode[block] in ATTENDING
        prefill[block] = draw(st.sampled_from(WRITING if attends else list(Mode)))
        if attends and draw(st.booleans()):
            rules[block] = draw(transfers())
    return PruningPlan(
        model=ModelSignature(
            model_type="llama",
            num_blocks=num_blocks,
            hidden_size=8,
            num_kv_heads=2,
            head_dim=4,
            vocab_size=9,
            weights_fingerprint="weights",
        ),
        first_token=draw(st.sampled_from(["prefill", "decode"])),
        prefill=StagePlan(blocks=prefill),
        decode=StagePlan(blocks=decode),
        kv_transfer=rules,
    )


@pytest.fixture(scope="session")
def any_plan() -> st.SearchStrategy[PruningPlan]:
    return plans()


@pytest.fixture(scope="session")
def any_rule() -> st.SearchStrategy[KVTransfer]:
    return transfers()


@pytest.fixture(scope="session")
def capture() -> Callable[..., CaptureCache]:
    """A cache that every block of ``blocks`` wrote random KV of ``num_tokens`` tokens to."""

    def make(
        windows: Sequence[int | None],
        num_tokens: int,
        *,
        batch: int = 1,
        heads: int = 2,
        dim: int = 4,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> CaptureCache:
        generator = torch.Generator().manual_seed(seed)
        cache = CaptureCache(windows, num_kv_heads=heads, head_dim=dim, dtype=dtype)
        if not num_tokens:
            return cache
        for block in range(len(windows)):
            keys, values = (
                torch.randn(batch, num_tokens, heads, dim, generator=generator)
                .to(dtype)
                .transpose(1, 2)  # as projections leave it: not contiguous
                for _ in range(2)
            )
            cache.update(keys, values, block)
        return cache

    return make


@pytest.fixture(scope="session")
def envelope() -> Envelope:
    return Envelope("request-7", 1, "plan-a", "weights-a")


@pytest.fixture(scope="session")
def segment() -> KVSegment:
    """Three blocks of 3, 0 and 5 entries with gaps in their positions, one per encoding."""
    generator = torch.Generator().manual_seed(1)
    positions = {0: [0, 1, 7], 2: [], 5: [0, 3, 4, 5, 8]}
    encodings = {0: "model", 2: "int8", 5: "int4"}
    blocks = tuple(
        BlockKV(
            block,
            torch.randn(2, len(kept), 4, generator=generator),
            torch.randn(2, len(kept), 4, generator=generator),
            torch.tensor(kept, dtype=torch.int64),
            encodings[block],  # type: ignore[arg-type]
        )
        for block, kept in positions.items()
    )
    return KVSegment(blocks, num_prompt_tokens=9, num_prefilled=9)
