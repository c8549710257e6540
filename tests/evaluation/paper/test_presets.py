from __future__ import annotations

import pytest

from rayapp.evaluation.paper.count import search_evaluations
from rayapp.evaluation.paper.presets import TABLES, cheapest_blocks, encoded, last_blocks, rows_of
from rayapp.evaluation.paper.rows import Row
from rayapp.plan import Mode, ModelSignature, PruningPlan, StagePlan
from rayapp.pruning.search.sensitivity import Sensitivity, Singles
from rayapp.pruning.settings.search import SearchSettings


def model(num_blocks: int) -> ModelSignature:
    return ModelSignature(
        model_type="llama", num_blocks=num_blocks, hidden_size=8, num_kv_heads=1, head_dim=8,
        vocab_size=9, weights_fingerprint="v2:0",
    )  # fmt: skip


def costs(prefill: tuple[float, ...], decode: tuple[float, ...]) -> Sensitivity:
    singles = Singles(objective="kl", score_by="task", dense=0.0, prefill=prefill, decode=decode)
    return Sensitivity(weights="w", calibration="c", num_lines=1, singles=singles)


def test_sizes_are_those_of_thirty_blocks():
    sizes = {row.sizes for row in rows_of("paper", 30) if row.family == "ours"}
    prefill = {(k, 0) for k in (2, 4, 6, 8, 10, 12, 15)}
    assert sizes == prefill | {(0, k) for k in (1, 2, 3, 4)} | {(4, 2), (8, 2), (8, 4)}


@pytest.mark.parametrize("num_blocks", [2, 5, 12, 30, 80])
def test_every_row_can_be_made_at_any_depth(num_blocks):
    rows = rows_of("paper", num_blocks)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    for row in rows:
        assert row.beside in ("", *names)
        if row.sizes is not None and row.search is not None:
            wanted = {**row.search, "prefill_remove": row.sizes[0], "decode_remove": row.sizes[1]}
            search = SearchSettings.checked(out="x", **{"method": "surrogate", **wanted})
            assert search_evaluations(search, num_blocks) >= 1
        if row.made is not None:
            plan = row.made(model(num_blocks))
            assert (plan.removed("prefill"), plan.removed("decode")) == row.sizes


def test_tables_keep_their_rows():
    assert rows_of("tables", 7) is TABLES
    assert len(TABLES) == 14


def test_pops_rule_writes_the_kv_of_the_last_blocks():
    plan = last_blocks(2, 0, model(5))
    assert plan.prefill.blocks == {3: Mode.KV_ONLY, 4: Mode.KV_ONLY}
    assert not plan.decode.blocks
    assert plan.first_token == "decode"


def test_a_plan_in_int4_keeps_its_blocks():
    plan = encoded("int4", model(5), last_blocks(2, 0, model(5)))
    assert plan.prefill == last_blocks(2, 0, model(5)).prefill
    assert plan.first_token == "decode"
    assert {plan.transfer(block).encoding for block in range(5)} == {"int4"}
    removed = PruningPlan(model=model(5), decode=StagePlan(blocks={1: Mode.REMOVED}))
    assert set(encoded("int8", model(5), removed).kv_transfer) == {0, 2, 3, 4}


def test_the_cheapest_blocks_are_those_of_the_mean_over_sets():
    maps = [
        costs((3.0, 0.1, 0.5, 0.2), (9.0, 0.3, 0.2, 9.0)),
        costs((3.0, 0.1, 0.1, 0.9), (9.0, 0.1, 0.4, 9.0)),
    ]
    row = Row("any", "any", "", sizes=(2, 1), first_token="decode", mapped=True)
    plan = cheapest_blocks(row, model(4), maps)
    assert set(plan.prefill.blocks) == {1, 2}
    assert plan.decode.blocks == {1: Mode.REMOVED}, "0.4 against 0.6 in sum"
    assert plan.first_token == "decode"
