"""Options that mean the same in every benchmark, and how a record names them."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayapp.models.architecture import DTYPES
from rayapp.testbed import text_model_path, vision_model_path

RESULTS = Path(__file__).parents[1] / "results"
_UNRECORDED = ("out", "name", "render", "work", "beside")
"""Options that say where files go, and change no number."""


@dataclass(frozen=True)
class NamedPath:
    """A path with a name, ``NAME=PATH`` on the command line; a path alone has an empty name."""

    name: str
    path: Path

    @classmethod
    def parse(cls, text: str) -> NamedPath:
        """Read the text of an option."""
        name, equals, path = text.rpartition("=")
        return cls(name, Path(path)) if equals else cls("", Path(text))

    def __str__(self) -> str:
        """The text of the option."""
        return f"{self.name}={self.path}" if self.name else str(self.path)


def benchmark_parser(doc: str | None) -> ArgumentParser:
    """A parser with the options of every benchmark; the rest are added by the functions below.

    A script without ``--device`` or ``--dtype`` runs in float32 on the CPU.

    Args:
        doc: The script's docstring, which is its help text.
    """
    parser = ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(device="cpu", dtype="float32")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch computes with")
    parser.add_argument("--name", help="last part of the result files' name")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the result files")
    parser.add_argument(
        "--render", type=Path, nargs="+", metavar="RECORD",
        help="write the pages of these records again, and measure nothing",
    )  # fmt: skip
    return parser


def add_model(
    parser: ArgumentParser, default: Path | None = None, *, several: bool = False
) -> None:
    """``--model``: a checkpoint directory, or several; by default the shipped text model."""
    shipped = default or text_model_path()
    how: dict[str, Any] = {"nargs": "+", "default": [shipped]} if several else {"default": shipped}
    parser.add_argument("--model", type=Path, help="model directory; default: shipped", **how)


def add_shape(parser: ArgumentParser, shapes: Iterable[str], default: str | None = None) -> None:
    """``--shape``: random weights of a known size instead of a trained model."""
    parser.add_argument(
        "--shape", choices=sorted(shapes), default=default, help="random weights of this size"
    )


def add_dtype(parser: ArgumentParser, default: str, *, auto: bool = False) -> None:
    """``--dtype``: the element type of weights and KV; ``auto`` is the checkpoint's own."""
    choices = ["auto"] * auto + sorted(DTYPES)
    parser.add_argument("--dtype", choices=choices, default=default)


def add_device(parser: ArgumentParser, default: str) -> None:
    """``--device``: the device that the model runs on."""
    parser.add_argument("--device", default=default, help="as torch names it: cpu, cuda, cuda:1")


def add_seed(parser: ArgumentParser, of: str, default: int = 0) -> None:
    """``--seed``: seed of all random draws."""
    parser.add_argument("--seed", type=int, default=default, help=f"seed of {of}")


def model_name(path: Path) -> str:
    """A model's name in tables and file names: that of its directory, or of a shipped model."""
    shipped = {text_model_path(): "testbed-text", vision_model_path(): "testbed-vision"}
    names = {known.resolve(): name for known, name in shipped.items()}
    return names.get(path.resolve(), path.name)


def model_label(arguments: Namespace) -> str:
    """The model's label in names of files; empty if the benchmark has no model."""
    return model_name(arguments.model) if hasattr(arguments, "model") else ""


def speed_label(arguments: Namespace) -> str:
    """The label of a speed in names of files: model or shape, element type, and a GPU."""
    name = arguments.shape or model_name(arguments.model)
    return f"{name}-{arguments.dtype}" + ("-gpu" if arguments.device != "cpu" else "")


def configuration_of(arguments: Namespace) -> dict[str, Any]:
    """The options of a run as a record has them; a path has only its name, as folders are of one
    machine.
    """
    return {key: _named(value) for key, value in vars(arguments).items() if key not in _UNRECORDED}


def _named(value: Any) -> Any:
    if isinstance(value, Path):
        return model_name(value)
    if isinstance(value, NamedPath):
        return str(NamedPath(value.name, Path(value.path.name)))
    if isinstance(value, (list, tuple)):
        return [_named(each) for each in value]
    return value
