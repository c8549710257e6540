from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("gguf", reason="package gguf is not installed (extra `gguf`)")


def test_both_maps_are_those_of_single_removals(run_script, save_tiny, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    model = save_tiny(tmp_path, "qwen3", **sizes)
    out = run_script("quantised_map", "--model", model, "--per-task", 1)
    record = json.loads((out / "quantised_map-qwen3-q4_1.json").read_text())
    assert record["num_lines"] == 4
    assert record["own_kl"] > 0
    for name in ("before", "after"):
        for stage in ("prefill", "decode"):
            assert len(record["maps"][name][stage]) == 3
            assert min(record["maps"][name][stage]) > 0
    before, after = (np.array(record["maps"][name]["prefill"]) for name in ("before", "after"))
    assert not np.array_equal(before, after)
    page = (out / "quantised_map-qwen3-q4_1.md").read_text()
    assert "**prefill**: rank correlation" in page
    assert "**decode**: rank correlation" in page
    assert f"| 0 | {before[0]:.4g} | {after[0]:.4g} |" in page
    assert (out / "quantised_map-qwen3-q4_1.svg").is_file()
