"""What cannot be exported is one clear error, and leaves nothing behind."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file, save_file

from rayapp.errors import InputError, ModelError, PlanError
from rayapp.export import export_stage
from rayapp.models import shards


@pytest.mark.parametrize(
    ("prefill", "decode", "stage", "wanted"),
    [
        ({1: "kv_only"}, {}, "prefill", r"prefill.* 1 \(kv_only\).*--no-kv-modes"),
        ({1: "kv_only"}, {1: "removed"}, "unified", r"prefill.* 1 \(kv_only\).*--shared"),
        ({2: "mlp_and_kv"}, {}, "prefill", r"2 \(mlp_and_kv\).*--unit block and --no-kv-modes"),
        (
            {},
            {0: "attention_only", 4: "mlp_only"},
            "decode",
            r"decode.* 0 \(attention_only\), 4 \(mlp_only\).*--unit block",
        ),
        ({}, {4: "mlp_only"}, "unified", r"decode.* 4 \(mlp_only\)"),
        ({1: "removed"}, {1: "removed", 3: "removed"}, "unified", r"\[1\].*\[1, 3\].*--shared"),
        ({}, dict.fromkeys(range(5), "removed"), "decode", "none of the 5 blocks"),
    ],
)
def test_what_no_checkpoint_can_hold_is_refused(
    save_tiny, tmp_path, prefill, decode, stage, wanted, plan_for
):
    path = save_tiny(tmp_path, "llama")
    plan = plan_for(path, prefill=prefill, decode=decode)
    with pytest.raises(PlanError, match=wanted) as caught:
        export_stage(path, plan, stage, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


def test_the_wrong_model_and_taken_places_are_refused(save_tiny, tmp_path, plan_for):
    path, other = save_tiny(tmp_path, "llama"), save_tiny(tmp_path, "qwen3")
    plan = plan_for(path, decode=[1])
    with pytest.raises(PlanError, match="another model"):
        export_stage(other, plan, "decode", tmp_path / "out")
    with pytest.raises(InputError, match="not empty"):
        export_stage(path, plan, "decode", path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        export_stage(path, plan, "decode", tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        export_stage(path, plan, "decode", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "llama", "qwen3"]


def test_a_failure_leaves_nothing_behind(save_tiny, tmp_path, monkeypatch, plan_for):
    path = save_tiny(tmp_path, "llama")
    plan, before = plan_for(path, decode=[1]), sorted(p.name for p in tmp_path.iterdir())
    calls = []

    def full(*_, **__):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", lambda *a, **k: (save_file(*a, **k), full()))
    with pytest.raises(InputError, match="No space left"):
        export_stage(path, plan, "decode", tmp_path / "out", max_shard_bytes=1)
    assert len(calls) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_incomplete_and_misshapen_sources_are_named(save_tiny, tmp_path, plan_for):
    path = save_tiny(tmp_path, "llama")
    plan = plan_for(path, decode=[1]).model_copy(update={"model": None})
    tensors = load_file(path / "model.safetensors")
    lost = tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 tensors are missing"):
        export_stage(path, plan, "decode", tmp_path / "out")
    tensors["model.layers.2.mlp.up_proj.weight"] = lost[:-1]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.2\.mlp.*shape"):
        export_stage(path, plan, "decode", tmp_path / "out")
    assert not (tmp_path / "out").exists()
