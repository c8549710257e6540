from __future__ import annotations

import json

import pytest
from handoff.gains import Comparison, Costs, dense_ratio

DENSE = Costs(prefill_s=2.0, tpot_s=0.1, codec_s=0.5, num_bytes=1_000_000)


def test_gains_by_hand():
    plan = Costs(prefill_s=2.0, tpot_s=0.05, codec_s=0.5, num_bytes=500_000)
    # r = 3: the dense transfer takes 6 s, the plan's 3 s; 10 steps follow the first token.
    assert Comparison(DENSE, plan, 11).gain(3.0) == pytest.approx((2.5 + 6 + 1) / (2.5 + 3 + 0.5))
    assert Comparison(DENSE, plan, 1).gain(0.0) == pytest.approx(2.6 / 2.55)
    assert dense_ratio(DENSE, 0.004) == pytest.approx(1.0)  # 8 Mbit at 4 Mbit/s


def test_break_even_is_where_the_gain_is_one():
    slow_codec = Costs(prefill_s=2.0, tpot_s=0.1, codec_s=0.9, num_bytes=250_000)
    comparison = Comparison(DENSE, slow_codec, 11)
    at = comparison.break_even()
    assert at == pytest.approx(0.4 / 0.75 / 2.0)
    assert comparison.gain(at) == pytest.approx(1.0)
    assert comparison.gain(0.9 * at) < 1 < comparison.gain(1.1 * at)
    assert Comparison(DENSE, DENSE, 11).break_even() == 0.0
    slower = Costs(prefill_s=3.0, tpot_s=0.1, codec_s=0.5, num_bytes=1_000_000)
    assert Comparison(DENSE, slower, 11).break_even() is None


def test_a_map_of_the_shipped_model(run_script):
    out = run_script(
        "break_even", "--prompt-tokens", 140, "--answer-tokens", 9, "--runs", 1, "--steps", 2,
        "--name", "small",
    )  # fmt: skip
    record = json.loads((out / "break_even-small.json").read_text())
    costs = {name: Costs(**row) for name, row in record["results"].items()}
    dense = costs["dense"]
    assert costs["4.95x by fewer entries"].num_bytes <= dense.num_bytes / 4.9
    assert costs["int8"].prefill_s == dense.prefill_s  # the same computation has one time
    assert costs["int8"].tpot_s == dense.tpot_s != costs["4.95x by fewer entries"].tpot_s
    assert dense.num_bytes > record["dense_kv_bytes"]
    page = (out / "break_even-small.md").read_text()
    assert "assumed, not measured" in page
    assert "1 Gbit/s" in (out / "break_even-small.svg").read_text()
