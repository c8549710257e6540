from __future__ import annotations

import json

from rich.console import Console

from rayapp.plan import PruningPlan
from rayapp.workflows.tables import ledger_tables, plan_tables

TOTALS = {
    "num_transfers": 3, "bytes_full": 10_000, "bytes_sent": 2_600, "overhead_bytes": 100,
    "saved_by_visual_tokens_bytes": 0, "saved_by_blocks_bytes": 4_000,
    "saved_by_tokens_bytes": 3_500, "saved_by_encoding_bytes": 0,
    "reduction_factor": 10_000 / 2_600, "gb_per_s": 0.5,
}  # fmt: skip


def drawn(parts):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(*parts, sep="\n")
    return console.export_text()


def test_every_block_of_a_plan_is_drawn():
    plan = PruningPlan.parse(
        json.dumps(
            {
                "model": {
                    "model_type": "llama", "num_blocks": 3, "hidden_size": 8, "num_kv_heads": 1,
                    "head_dim": 8, "vocab_size": 9, "weights_fingerprint": "f00",
                },
                "prefill": {"blocks": {"0": "kv_only", "2": "removed"}},
                "decode": {"blocks": {"2": "mlp_only"}},
                "kv_transfer": {"1": {"first": 4, "last": 0.25, "encoding": "int8"}},
            }
        )
    )  # fmt: skip
    captioned = plan.model_copy(update={"provenance": {"model": {"caption": "Small, from Q4_1"}}})
    assert "for Small, from Q4_1: llama of 3 blocks" in drawn(plan_tables(captioned))
    text = drawn(plan_tables(plan))
    assert "for llama of 3 blocks" in text
    assert "2 from prefill, 0.5 from decode" in text
    rows = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["0", "kv_only", "full", "all", "model"],
        ["1", "full", "full", "first 4 + last 25%", "int8"],
        ["2", "removed", "mlp_only", "-", "-"],
    ]


def test_whose_work_a_healed_block_does_is_drawn():
    plan = PruningPlan.parse(
        json.dumps(
            {
                "model": {
                    "model_type": "llama", "num_blocks": 3, "hidden_size": 8, "num_kv_heads": 1,
                    "head_dim": 8, "vocab_size": 9, "weights_fingerprint": "f00",
                },
                "decode": {"blocks": {"1": "removed"}},
                "healed": "0" * 24,
                "provenance": {"healed": [{
                    "stage": "decode", "removed": 1, "survivor": 2,
                    "relative_mse_before": 0.08123, "relative_mse_after": 0.0021,
                }, {
                    "stage": "decode", "kind": "bridge", "first": 1, "stop": 2, "block": 1,
                    "relative_mse_before": 1.0, "relative_mse_after": 0.25,
                }]},
            }
        )
    )  # fmt: skip
    text = drawn(plan_tables(plan))
    assert f"healed tensors: {'0' * 24} in weights.safetensors" in text
    assert "full + 1 (healed, relative MSE 0.081 to 0.0021)" in text
    assert "removed + bridge 1 to 2 (healed, relative MSE 1 to 0.25)" in text


def test_an_empty_plan_says_so():
    assert "dense model" in drawn(plan_tables(PruningPlan()))


def test_the_ledger_adds_up_on_paper():
    link = {"source_node": "aa", "destination_node": "bb", **TOTALS}
    text = drawn(ledger_tables({"totals": TOTALS, "links": [link], "recent": []}))
    for number in ("10,000", "-4,000", "-3,500", "+100", "2,600", "3.846x"):
        assert number in text


def test_an_idle_ledger_is_drawn():
    idle = {**dict.fromkeys(TOTALS, 0), "reduction_factor": None, "gb_per_s": None}
    assert "nothing sent" in drawn(ledger_tables({"totals": idle, "links": [], "recent": []}))
