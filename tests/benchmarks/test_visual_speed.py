from __future__ import annotations

import json

import pytest
import torch

SMALL = (
    "--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--batch", 1, 2, "--runs", 2, 1,
    "--answer-tokens", 4, "--clock", "cpu",
)  # fmt: skip


def test_the_same_code_on_a_cpu(run_script):
    out = run_script("visual_speed", *SMALL)
    record = json.loads((out / "visual_speed-tiny-float32.json").read_text())
    assert [(row["batch"], row["runs"]) for row in record["results"]] == [(1, 2), (2, 1)]
    for row in record["results"]:
        assert row["answers_repeat"] == {"dense": True, "pruned": True}
        for name in ("ttft", "tpot", "answer"):
            found = row["speedups"][name]
            low, high = found["interval_95"]
            assert low <= found["speedup"] <= high
            assert found["bound"] > 1
        sides = row["sides"]
        for name in ("ttft", "tpot", "answer"):
            ratio = sides["dense"][f"{name}_ms"] / sides["pruned"][f"{name}_ms"]
            assert row["speedups"][name]["speedup"] == pytest.approx(ratio)
        share = row["selection_ms"] / sides["dense"]["ttft_ms"]
        assert row["selection_share_of_dense_ttft"] == pytest.approx(share)
        assert len(sides["dense"]["runs"]) == len(sides["pruned"]["runs"]) == row["runs"]
    # Entries that travel: 624 tokens, or 64 + 48, of 2 blocks x 2 x 64 float32.
    dense, pruned = record["transfers"]["dense"], record["transfers"]["pruned"]
    assert dense["bytes_full"] == pruned["bytes_full"] == 624 * 2 * 2 * 64 * 4
    assert pruned["bytes_sent"] - pruned["overhead_bytes"] == 112 * 2 * 2 * 64 * 4
    for images, each in zip((1, 2, 4, 6), record["transfers"]["by_images"], strict=True):
        entries = 64 * images + 48, 576 * images + 48
        payload = each["bytes_sent"] - each["overhead_bytes"]
        assert payload * entries[1] == each["bytes_full"] * entries[0]
    assert len(record["caveats"]) == 3
    assert "| 2 | 1 |" in (out / "visual_speed-tiny-float32.md").read_text()


def test_operations_are_those_that_torch_counts(monkeypatch, run_script):
    """The bound's formulas against the counter of operations, attention apart."""
    from shapes.llava import random_llava
    from torch.utils.flop_counter import FlopCounterMode
    from visual.bounds import work_of
    from visual.runs import Bench

    from rayapp.plan import VisualTokens

    bench = Bench(
        random_llava("tiny", torch.float32, "cpu"), VisualTokens(num_keep=64),
        text_tokens=8, num_answer=2, clock="cpu",
    )  # fmt: skip
    requests, decode = bench.requests(2), bench.decode_engine(2)
    with FlopCounterMode(display=False) as counter:
        bench.run("dense", requests, decode)
    work = work_of(bench.model, bench.stack, batch=2, num_run=584, num_answer=2, num_keep=None)
    ours = work.tower[0] + work.prefill[0] + work.decode_step[0]
    attended = 2 * 2 * 584**2 * 64 * 2 + 2 * 4 * 577**2 * 32 * 2 + 2 * 4 * 585 * 64 * 2
    assert counter.get_total_flops() == pytest.approx(ours - attended, rel=0.01)


def test_without_a_gpu_it_says_so(run_script, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    out = run_script("visual_speed")
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(out.glob("visual_speed*"))
