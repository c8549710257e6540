from __future__ import annotations

import json

import pytest
import torch

SMALL = (
    "--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--lines", 4, "--chunk-lines", 2,
    "--prompt-tokens", 48, "--continuation-tokens", 8, "--candidates", 4, "--naive", 2,
    "--kl-top-k", 16, "--cache-gb", 0.5,
)  # fmt: skip


def test_the_same_code_on_a_cpu(run_script):
    out = run_script("search_gpu", *SMALL)
    results = json.loads((out / "search_gpu-tiny-float32.json").read_text())["results"]
    assert set(results) == {"decode only", "both stages"}
    weights, norms = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160, 2 * 64  # of a block
    for result in results.values():
        assert result["largest_difference"] < 1e-5
        assert 0 < result["forwards_saved"] < 1
        ours, naive = result["ours"], result["naive"]
        assert (ours["candidates"], naive["candidates"]) == (4, 2)
        assert ours["candidates_per_s"] * ours["seconds"] == pytest.approx(4)
        assert result["times_faster"] == pytest.approx(2 * naive["seconds"] / ours["seconds"])
        assert result["block_bytes_read"] == 4 * (weights + norms) * ours["blocks_run"]
        assert result["bound_s"] == max(result["compute_s"], result["memory_s"])
        assert result["share_of_bound"] == pytest.approx(result["bound_s"] / ours["seconds"])
    # Attention's own products come on top where torch counts them.
    head = 2 * 64 * 300 * 4 * 4 * 8
    decode = results["decode only"]
    assert decode["flops"] >= 2 * weights * decode["ours"]["forwards"] + head
    assert "| decode only | 4 |" in (out / "search_gpu-tiny-float32.md").read_text()


def test_without_a_gpu_it_says_so(run_script, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    out = run_script("search_gpu")
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(out.glob("search_gpu*"))
