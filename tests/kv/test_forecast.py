"""A forecast is what the message weighs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayapp.kv.forecast import RunPrompt, forecast_sizes
from rayapp.kv.ledger import KVShape
from rayapp.kv.select import num_prefilled, select_segment
from rayapp.kv.wire import Envelope, message_sizes, pack


@pytest.mark.parametrize("windows", [(None,) * 5, (None, 12, 7, None, 2)], ids=["full", "sliding"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equal_to_the_message(data, windows, any_plan, capture, envelope):
    plan = data.draw(any_plan)
    num_tokens = data.draw(st.integers(1, 130))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    request = data.draw(st.sampled_from(["r", "r" * 32, "request-1234"]))
    whose = Envelope(request, 1, plan.fingerprint, envelope.weights_fingerprint)
    # Visual tokens leave gaps, unless positions close them.
    removed = data.draw(st.sets(st.integers(0, num_tokens - 2))) if num_tokens > 1 else set()
    compact = bool(removed) and data.draw(st.booleans())
    kept = [p for p in range(num_tokens) if p not in removed]
    placed = list(range(len(kept))) if compact else kept
    num_run = num_prefilled(plan, len(kept))
    cache = capture(windows, num_run, dtype=dtype)
    segment = select_segment(
        plan,
        cache,
        torch.tensor(placed[:num_run], dtype=torch.int64),
        num_tokens,
        num_visual_tokens_removed=len(removed),
        is_compact=compact,
    )
    # Without blocks nothing tells a message its shape: it names one head of size one in float32.
    shape = KVShape.of(cache) if segment.blocks else KVShape(5, 1, 1, 4, windows)
    gaps = tuple(kept) if removed and not compact else None
    prompt = RunPrompt(num_tokens, len(removed), gaps)
    found = forecast_sizes(shape, dtype if segment.blocks else torch.float32, plan, whose, prompt)
    assert found == message_sizes(pack(segment, whose))
