"""``rayapp export``: what it prints, and how it refuses."""

from __future__ import annotations

import shutil

import pytest
import torch

from rayapp import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """``run("--stage", ...)`` of ``rayapp export``: exit code, standard output and error."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["rayapp", "export", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_the_command(run, save_tiny, tmp_path, plan_for, stage_logits, plain_logits):
    path = save_tiny(tmp_path, "llama")
    plan = plan_for(path, prefill={1: "kv_only"}, decode=[1])
    saved = plan.save(tmp_path / "plan").parent
    arguments = ("--model", path, "--plan", saved, "--out", tmp_path / "out")
    code, out, err = run(*arguments, "--stage", "decode")
    assert code == 0, err
    assert "decode with 4 of 5 blocks" in out
    assert torch.equal(plain_logits(tmp_path / "out"), stage_logits(path, plan, "decode"))
    for options, said in (
        (("--stage", "decode"), "not empty"),
        (("--stage", "prefill"), r"1 (kv_only)"),
        (("--stage", "unified"), "--shared"),
        (("--stage", "decode", "--plan", tmp_path / "no"), "cannot be read"),
        (("--stage", "decode", "--model", tmp_path / "no"), "no such model directory"),
    ):
        code, _, err = run(*arguments, *options)
        assert code == 2
        assert said in err
        assert len(err.strip().splitlines()) == 1
    assert run(*arguments, "--stage", "both")[0] == 2
    shutil.rmtree(tmp_path / "out")
    assert run(*arguments)[0] == 2
