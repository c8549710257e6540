"""Every setting is healed in every way, and the page shows what the record holds."""

from __future__ import annotations

import json


def test_every_way_of_healing_is_judged(run_script, save_tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A line that is learnt from, and one that judges. " * 40, encoding="utf-8")
    out = run_script(
        "linear_healing", "--model", save_tiny(tmp_path, "llama"), "--heal-text", text,
        "--judge-text", text, "--heal-windows", 16, "--judge-windows", 2, "--prompt-tokens", 24,
        "--answer-tokens", 24, "--pair-steps", 1, "--settings", "prefill 1-2", "decode 1,3",
    )  # fmt: skip
    record = json.loads((out / "linear_healing-llama.json").read_text())
    rows = {(row["setting"], row["healing"]): row for row in record["rows"]}
    assert [name for setting, name in rows if setting == "decode 1,3"] == [
        "none", "linear", "linear, served states", "pairs", "pairs for one block, else linear"
    ]  # fmt: skip
    assert len(rows) == 9  # a single span of prefill reads dense states anyway
    assert rows["prefill 1-2", "none"]["bytes"] == 0
    bridge, kv = 48 * 48 + 48, 2 * 32 * 48
    assert rows["prefill 1-2", "linear"]["bytes"] == 4 * (bridge + kv)
    assert all(row["kl"] > 0 for row in rows.values())
    page = (out / "linear_healing-llama.md").read_text()
    assert "| prefill 1-2 | linear |" in page
