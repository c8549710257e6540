from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "headline.py"


def row(name: str, upper: float, decode: int, heal: str = "none") -> dict:
    return {
        "plan_name": name, "worst_lost_upper": upper, "decode_remove": decode,
        "prefill_remove": 1, "heal": heal, "goal": "2:int8",
    }  # fmt: skip


def test_the_furthest_plan_within_the_limit_is_chosen():
    choose = runpy.run_path(str(SCRIPT), run_name="benchmark")["choose"]
    rows = [row("mild", 0.5, 1), row("far", 0.9, 3), row("worse", 2.5, 4)]
    healed = [row("healed", 8.0, 2, "all"), row("healed far", 9.0, 3, "all")]
    chosen = dict(choose([*rows, *healed]))
    mildest = " (limit not kept on validation: the mildest)"
    assert {goal: found["plan_name"] for goal, found in chosen.items()} == {
        "1 points, healing none, 2:int8": "far",
        "3 points, healing none, 2:int8": "worse",
        f"1 points, healing all, 2:int8{mildest}": "healed",
        f"3 points, healing all, 2:int8{mildest}": "healed",
    }


@pytest.mark.slow
def test_front_without_healing_and_with(run_script, save_tiny, tmp_path):
    model = save_tiny(tmp_path, "llama")
    out = run_script(
        "headline", "--model", model, "--decode-remove", 1, "--unit", "block", "part", "--goals",
        "2:int8", "--calibration-per-task", 1, "--validation-per-task", 2, "--test-per-task", 2,
        "--runs", 2, "--work", tmp_path / "work",
    )  # fmt: skip
    record = json.loads((out / f"headline-{model.name}.json").read_text())
    rows = {row["plan_name"]: row for row in record["validation"]}
    # Parts are searched without healing alone: only whole blocks are healed.
    assert set(rows) == {"none-1-1-kv2-int8", "none-1-1-parts-kv2-int8", "all-1-1-kv2-int8"}
    # The choice weighs this checkpoint's float32, the front bf16: scales weigh more beside it.
    assert all(1.8 < row["reduction"] < 2.1 for row in rows.values())
    assert len(record["chosen"]) == 2 * 2  # limits, with healing and without
    assert set(record["chosen"].values()) == set(record["test"])
    page = (out / f"headline-{model.name}.md").read_text()
    for name, tested in record["test"].items():
        assert tested["worst_lost_upper"] >= tested["worst_lost"]
        assert tested["examples_per_task"] == 2
        speeds = ("speedup", "speedup_batch8", "ttft_speedup", "tpot_speedup")
        timed = " | ".join(f"{tested['speed'][key]:.3f}x" for key in speeds)
        assert page.count(f"| {name} | {tested['worst_task']} | ") >= 1
        assert page.count(f" | {timed} | {tested['reduction']:.2f}x |") >= 1
    assert page.count("\n| all-1-1-kv2-int8 |") == 1
