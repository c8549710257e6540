"""A model is brought whole or not at all, and what is wrong is one line with its remedy."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rayapp.errors import DataError, InputError, ModelError
from rayapp.evaluation.evaluate import evaluate
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.table import tables
from rayapp.models.formats import wheel as wheel_module
from rayapp.models.formats.brought import SMOLLM2, BroughtModel
from rayapp.models.formats.gguf import write_dequantised
from rayapp.models.formats.origin import ORIGIN_FILE, read_origin
from rayapp.models.formats.wheel import PackagedWeights
from rayapp.models.hub import from_directory
from rayapp.models.loading import load_model, read_signature
from rayapp.workflows import smollm2 as workflow
from rayapp.workflows.smollm2 import bring
from tests.models.formats.tiny_gguf import (
    LICENSE,
    MEMBER,
    sha256,
    tiny_original,
    write_gguf,
    write_wheel,
)

pytest.importorskip("gguf", reason="package gguf is not installed (extra `gguf`)")
PYTHON = sys.executable
CAPTION = "Tiny, from Q4_1"
TEXT = "\n\n".join("a wall of dry stones needs no mortar, only time" for _ in range(12))


@pytest.fixture(scope="module")
def carried(tmp_path_factory) -> tuple[BroughtModel, Path]:
    """A tiny model that can be brought, and its wheel."""
    home = tmp_path_factory.mktemp("carried")
    file = write_gguf(home / "tiny.gguf", tiny_original())
    (home / "made").mkdir()
    write_dequantised(file, home / "made")
    content = file.read_bytes()
    weights = PackagedWeights("carrier", "1.0", MEMBER, sha256(content), len(content))
    fingerprint = read_signature(home / "made").weights_fingerprint
    model = BroughtModel(CAPTION, weights, "Apache-2.0", fingerprint, 1.0, 10**6)
    return model, write_wheel(home / "carrier-1.0-py3-none-any.whl", file)


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def brought(carried, tmp_path, text):
    """``brought(**options)`` brings the tiny model to ``out``; returns what was printed."""

    def run(**options) -> str:
        model, wheel = carried
        out = options.pop("out", tmp_path / "out" / "tiny")
        given = {"wheel": wheel, "text": text, "model": model, **options}
        console = Console(file=io.StringIO(), width=200)
        bring(out, console, **given)
        return console.file.getvalue()

    return run


def left_in(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()} if directory.exists() else set()


def test_a_model_is_brought_judged_and_captioned(brought, tmp_path, carried):
    said = brought()
    out = tmp_path / "out" / "tiny"
    assert f"{CAPTION}, Apache-2.0, bfloat16" in said
    assert "windows of 512 tokens, the first 256 of each as context" in said
    assert left_in(tmp_path / "out") == {"tiny"}
    assert (out / "LICENSE").read_text() == LICENSE
    origin = read_origin(out)
    assert origin is not None
    assert (origin.source, origin.license) == ("carrier 1.0", "Apache-2.0")
    assert {*origin.files} | {ORIGIN_FILE} == left_in(out)
    assert load_model(out).signature.weights_fingerprint == carried[0].fingerprint
    # Results, plans and tables repeat the caption.
    assert from_directory(out).caption == CAPTION
    assert from_directory(out).provenance["model"]["caption"] == CAPTION
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "a wall of", "completion": " dry stones"}\n')
    settings = EvaluationSettings(num_runs=0, num_resamples=100)
    result = evaluate(out, None, [lines], settings=settings)
    assert all(table.title.endswith(f"({CAPTION})") for table in tables(result))


def test_a_second_time_it_is_verified_at_once(brought, tmp_path, monkeypatch):
    brought()
    monkeypatch.setattr(workflow, "_make", None)  # nothing is made again
    assert "already there, verified: Tiny, from Q4_1" in brought(text=None)
    assert "perplexity" in brought()
    out = tmp_path / "out" / "tiny"
    weights = out / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is not as it was written; remove"):
        brought(text=None)
    weights.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is not as it was written; remove"):
        brought(text=None)
    (out / ORIGIN_FILE).write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        brought(text=None)


def test_a_directory_that_holds_something_else_is_left_alone(brought, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="is not empty, and nothing is replaced; give another"):
        brought(out=out)
    with pytest.raises(InputError, match="is a file"):
        brought(out=out / "thesis.txt")
    assert left_in(out) == {"thesis.txt"}


@pytest.mark.parametrize("what", ["not a zip", "other member", "other bytes", "other size", "cut"])
def test_a_wheel_that_is_not_the_one_is_refused(brought, carried, tmp_path, what):
    model, good = carried
    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(good) as archive:
        content = bytearray(archive.read(MEMBER))
    if what == "not a zip":
        wheel.write_text("no")
    elif what == "cut":
        whole = good.read_bytes()
        damaged = bytearray(whole)
        damaged[200:400] = bytes(200)
        wheel.write_bytes(damaged)
    else:
        content[-1] ^= 1
        file = tmp_path / "other.gguf"
        file.write_bytes(content + b"!" * (what == "other size"))
        write_wheel(wheel, file, member="x/y.gguf" if what == "other member" else MEMBER)
    said = {
        "not a zip": "cannot be read as a wheel (not a zip archive)",
        "other member": f"holds no {MEMBER}; give the wheel of carrier==1.0",
        "other bytes": f"expected sha256 {model.weights.sha256}",
        "other size": f"expected {model.weights.num_bytes:,} bytes",
        "cut": "is damaged",
    }
    with pytest.raises(ModelError) as refused:
        brought(wheel=wheel)
    assert said[what] in str(refused.value)
    assert "\n" not in str(refused.value)
    assert left_in(tmp_path / "out") == set()


def test_weights_that_come_out_otherwise_are_refused(brought, carried, tmp_path):
    other = replace(carried[0], fingerprint="v2:other")
    with pytest.raises(ModelError, match="expected v2:other; this release of transformers"):
        brought(model=other)
    assert left_in(tmp_path / "out") == set()


def test_a_full_disk_leaves_nothing(brought, tmp_path, monkeypatch):
    def full(file, directory):
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(workflow, "write_dequantised", full)
    with pytest.raises(InputError, match=r"No space left on device.*nothing was left there"):
        brought()
    assert left_in(tmp_path / "out") == set()


def test_too_little_room_is_told_before_anything_is_fetched(brought, carried, monkeypatch):
    monkeypatch.setattr(workflow, "fetch_wheel", None)
    large = replace(carried[0], num_bytes=10**18)
    with pytest.raises(InputError, match="needs 1,000,000,000,000 MB while the model is made"):
        brought(model=large, wheel=None)


def test_an_interruption_leaves_nothing(brought, tmp_path, monkeypatch):
    def interrupted(file, directory):
        (directory / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "write_dequantised", interrupted)
    with pytest.raises(KeyboardInterrupt):
        brought()
    assert left_in(tmp_path / "out") == set()


def test_a_perplexity_that_is_not_the_copys_is_told(brought, tmp_path):
    with pytest.raises(ModelError, match=r"on the shipped prose, expected 1\.00"):
        brought(text=None)
    assert (tmp_path / "out" / "tiny" / "model.safetensors").is_file()


def test_a_text_that_is_not_there_is_told_first(brought, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        brought(text=tmp_path / "none.txt")
    assert left_in(tmp_path / "out") == set()


@pytest.fixture
def fake_pip(tmp_path, monkeypatch):
    """``fake_pip(code)``: ``python -m pip`` runs this code instead; ``words`` are its arguments."""

    def install(code: str) -> Path:
        program, log = tmp_path / "python", tmp_path / "words"
        program.write_text(
            f"#!{PYTHON}\nimport shutil, sys, time\nwords = sys.argv[1:]\n"
            f"open({str(log)!r}, 'w').write(' '.join(words))\n{code}\n"
        )
        program.chmod(0o755)
        monkeypatch.setattr(wheel_module.sys, "executable", str(program))
        return log

    return install


def test_pip_fetches_the_package_alone(brought, carried, fake_pip, tmp_path):
    log = fake_pip(f"shutil.copy({str(carried[1])!r}, words[words.index('--dest') + 1])")
    assert "fetching carrier==1.0 with pip" in brought(wheel=None)
    words = log.read_text().split()
    assert words[:2] == ["-m", "pip"]
    assert {"download", "--no-deps", "carrier==1.0"} <= set(words)
    assert left_in(tmp_path / "out") == {"tiny"}


def test_pips_complaint_is_repeated(brought, fake_pip, tmp_path):
    fake_pip(
        "print('WARNING: retry', file=sys.stderr); sys.exit('ERROR: No matching distribution')"
    )
    with pytest.raises(ModelError) as refused:
        brought(wheel=None)
    said = str(refused.value)
    assert said.startswith("carrier==1.0: cannot be fetched (No matching distribution); check the")
    assert "give --wheel FILE" in said
    assert "\n" not in said
    fake_pip("")
    with pytest.raises(ModelError, match="pip left no wheel"):
        brought(wheel=None)
    assert left_in(tmp_path / "out") == set()


def test_without_pip_the_way_out_is_told(brought, monkeypatch):
    monkeypatch.setattr(wheel_module.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModelError, match=r"has no pip; run `python -m ensurepip`.*--wheel FILE"):
        brought(wheel=None)


def test_verifying_needs_no_torch():
    code = (
        "import sys, rayapp.models.formats.brought; assert not {'torch', 'numpy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=400)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_package_is_what_it_was(tmp_path):
    """The index of this machine is asked; where it has no such package, or there is none, skip."""
    weights = SMOLLM2.weights
    try:
        wheel = wheel_module.fetch_wheel(weights, tmp_path, lambda _seconds: None)
    except ModelError as error:
        pytest.skip(f"the package cannot be fetched here: {error}")
    console = Console(file=io.StringIO(), width=200)
    bring(tmp_path / "smollm2", console, wheel=wheel)
    assert "perplexity" in console.file.getvalue()
    again = subprocess.run(
        [sys.executable, "-m", "rayapp.cli", "smollm2", "--out", tmp_path / "smollm2"],
        capture_output=True, text=True, timeout=400, check=True,
    )  # fmt: skip
    assert "already there, verified" in again.stdout
