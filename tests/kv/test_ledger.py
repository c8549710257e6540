"""The ledger: its bytes are those of real buffers, and its identity holds for any plan."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayapp.errors import IntegrityError
from rayapp.kv.ledger import (
    KVShape,
    Ledger,
    MessageSizes,
    Route,
    TransferRecord,
    TransferTimes,
    account,
)
from rayapp.kv.quantize import encode
from rayapp.kv.select import num_prefilled, select_segment
from rayapp.kv.wire import Envelope, message_sizes, pack
from rayapp.plan import KVTransfer, ModelSignature, PruningPlan, StagePlan

FIELDS = [
    "request_id",
    "attempt",
    "source_node",
    "destination_node",
    "num_prompt_tokens",
    "num_visual_tokens_removed",
    "bytes_full",
    "bytes_sent",
    "overhead_bytes",
    "saved_by_visual_tokens_bytes",
    "saved_by_blocks_bytes",
    "saved_by_tokens_bytes",
    "saved_by_encoding_bytes",
    "queue_s",
    "prefill_s",
    "put_s",
    "fetch_s",
    "copy_s",
    "hidden_s",
    "gb_per_s",
]
SAVINGS = [name for name in FIELDS if name.startswith("saved_by")]


def record(request_id: str = "r", source: str = "a", destination: str = "b") -> TransferRecord:
    numbers = (30, 0, 1000, 300, 50, 100, 400, 200, 50, 0.0, 0.3, 0.1, 0.2, 0.1, 0.05, 1.5e-6)
    return TransferRecord(request_id, 0, source, destination, *numbers)


def test_fields_are_those_that_documents_rely_on() -> None:
    assert [f.name for f in dataclasses.fields(TransferRecord)] == FIELDS


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(), num_tokens=st.integers(1, 30), dtype=st.sampled_from(["float32", "bfloat16"])
)
def test_bytes_are_those_of_the_buffers(any_plan, capture, data, num_tokens, dtype) -> None:  # type: ignore[no-untyped-def]
    plan = data.draw(any_plan)
    windows = tuple(data.draw(st.none() | st.integers(1, 16)) for _ in range(5))
    run = num_prefilled(plan, num_tokens)
    gone = data.draw(st.sets(st.integers(0, max(run - 1, 0)), max_size=run))
    positions = torch.tensor([p for p in range(run) if p not in gone], dtype=torch.int64)
    cache = capture(windows, len(positions), dtype=getattr(torch, dtype))
    segment = select_segment(plan, cache, positions, num_tokens)
    message = pack(segment, Envelope("r", 0, "p", "w"))
    removed = run - len(positions)
    made = account(
        KVShape.of(cache),
        plan,
        message_sizes(message),
        Route("r", 0, "a", "b"),
        num_prompt_tokens=num_tokens,
        num_visual_tokens_removed=removed,
    )

    dense = capture(windows, num_tokens, dtype=getattr(torch, dtype))
    pruned = capture(windows, num_tokens - removed, dtype=getattr(torch, dtype))
    buffers = [t for e in segment.blocks for t in encode(e.keys_HND, e.values_HND, e.encoding)]
    needed = {e.block for e in segment.blocks}
    needed_bytes = sum(t.nbytes for b in needed for t in pruned.entries(b))
    assert made.bytes_full == dense.nbytes
    assert made.bytes_sent == message.nbytes
    assert made.bytes_sent - made.overhead_bytes == sum(t.nbytes for t in buffers)
    assert made.saved_by_visual_tokens_bytes == dense.nbytes - pruned.nbytes
    assert made.saved_by_blocks_bytes == pruned.nbytes - needed_bytes
    assert made.saved_by_tokens_bytes == needed_bytes - segment.nbytes
    assert made.saved_by_encoding_bytes == segment.nbytes - sum(t.nbytes for t in buffers)
    saved = sum(getattr(made, name) for name in SAVINGS)
    assert made.bytes_full == made.bytes_sent - made.overhead_bytes + saved


def test_savings_by_hand() -> None:
    """Two heads x 4 x 2 bytes: 32 bytes per entry. Window 5 holds 4. T = 10, 3 visual gone."""
    plan = PruningPlan(
        model=ModelSignature(
            model_type="llama",
            num_blocks=3,
            hidden_size=8,
            num_kv_heads=2,
            head_dim=4,
            vocab_size=9,
            weights_fingerprint="w",
        ),
        first_token="decode",
        decode=StagePlan(blocks={1: "removed"}),
        kv_transfer={0: KVTransfer(first=1, last=2, encoding="int8")},
    )
    made = account(
        KVShape(3, 2, 4, 2, (None, None, 5)),
        plan,
        # Block 0: 3 entries, 24 + 24 codes, 8 key scales, 6 value scales; block 2: 4 entries.
        MessageSizes(24 + 16 + 24 + 12 + 4 * 32, 500),
        Route("r", 0, "a", "b"),
        num_prompt_tokens=10,
        num_visual_tokens_removed=3,
        times=TransferTimes(put_s=0.5, fetch_s=2.0, hidden_s=1.0),
    )
    assert made.bytes_full == (10 + 10 + 4) * 32
    assert made.saved_by_visual_tokens_bytes == (3 + 3 + 0) * 32
    assert made.saved_by_blocks_bytes == 7 * 32
    assert made.saved_by_tokens_bytes == 4 * 32
    assert made.saved_by_encoding_bytes == 3 * 32 - 76
    assert made.bytes_sent == 204 + 500
    assert made.gb_per_s == pytest.approx(704 / 2.0 / 1e9)


def test_the_dense_plan_saves_nothing(capture) -> None:  # type: ignore[no-untyped-def]
    cache = capture([None, 4], 9)
    message = pack(
        select_segment(PruningPlan(), cache, torch.arange(9), 9), Envelope("r", 0, "p", "w")
    )
    made = account(
        KVShape.of(cache), PruningPlan(), message_sizes(message), Route("r", 0, "a", "b"),
        num_prompt_tokens=9,
    )  # fmt: skip
    assert [getattr(made, name) for name in SAVINGS] == [0, 0, 0, 0]
    assert made.bytes_full == made.bytes_sent - made.overhead_bytes
    assert made.gb_per_s is None


def test_a_payload_that_the_plan_does_not_send_is_noticed() -> None:
    with pytest.raises(IntegrityError, match="holds 999 bytes"):
        account(
            KVShape(1, 2, 4, 2, (None,)), PruningPlan(), MessageSizes(999, 1),
            Route("r", 0, "a", "b"), num_prompt_tokens=3,
        )  # fmt: skip


@pytest.mark.parametrize("name", [*SAVINGS, "bytes_full", "bytes_sent", "overhead_bytes"])
def test_a_record_off_by_one_byte_cannot_be_made(name: str) -> None:
    with pytest.raises(IntegrityError, match="bytes_full"):
        dataclasses.replace(record(), **{name: getattr(record(), name) + 1})


def test_totals_links_and_merged_ledgers() -> None:
    one, two = Ledger(), Ledger()
    one.add(record("1"))
    one.add(record("2", destination="c"))
    two.add(record("3"))
    merged = Ledger.merge([pickle.loads(pickle.dumps(one)), two])
    content = json.loads(json.dumps(merged.as_json()))
    assert set(content) == {"totals", "links", "recent"}
    assert content["totals"]["num_transfers"] == 3
    assert content["totals"]["bytes_sent"] == 900
    assert content["totals"]["reduction_factor"] == pytest.approx(3000 / 900)
    assert content["totals"]["gb_per_s"] == pytest.approx(900 / 0.6 / 1e9)
    links = [
        (k["source_node"], k["destination_node"], k["num_transfers"]) for k in content["links"]
    ]
    assert links == [("a", "b", 2), ("a", "c", 1)]
    assert sum(link["bytes_full"] for link in content["links"]) == 3000
    assert sorted(r["request_id"] for r in content["recent"]) == ["1", "2", "3"]
    assert list(content["recent"][0]) == FIELDS
    assert one.totals.num_transfers == 2  # merging left the sources alone


def test_totals_keep_the_identity() -> None:
    ledger = Ledger()
    for number in range(5):
        ledger.add(record(str(number)))
    totals = ledger.as_json()["totals"]
    saved = sum(totals[name] for name in SAVINGS)
    assert totals["bytes_full"] == totals["bytes_sent"] - totals["overhead_bytes"] + saved


def test_an_empty_ledger_has_no_reduction() -> None:
    content = Ledger.merge([]).as_json()
    assert content["totals"]["reduction_factor"] is None
    assert content["totals"]["gb_per_s"] is None
    assert content["links"] == content["recent"] == []


def test_recent_is_bounded_and_totals_are_not() -> None:
    ledger = Ledger(capacity=3)
    for number in range(10):
        ledger.add(record(str(number)))
    assert [r.request_id for r in ledger.recent] == ["7", "8", "9"]
    assert ledger.totals.num_transfers == 10
    both = Ledger.merge([ledger, ledger], capacity=4)
    assert sorted(r.request_id for r in both.recent) == ["8", "8", "9", "9"]
    assert both.recent[-1].request_id == "9"


@pytest.mark.parametrize("count", [0, 2])
def test_parquet_holds_every_column(tmp_path, count: int) -> None:  # type: ignore[no-untyped-def]
    ledger = Ledger()
    for number in range(count):
        ledger.add(dataclasses.replace(record(str(number)), gb_per_s=None if number else 2.5))
    ledger.to_parquet(tmp_path / "ledger.parquet")
    table = pq.read_table(tmp_path / "ledger.parquet")
    assert table.column_names == FIELDS
    assert table.to_pylist() == [dataclasses.asdict(r) for r in ledger.recent]
