"""One run of a benchmark, from its options to its record and page."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rayapp.errors import InputError
from recorder.files import write_json
from recorder.options import model_label
from recorder.origin import Start
from recorder.page import Block, write_page
from recorder.record import Record, read_record

Report = Callable[[Record], Sequence[Block]]
"""A function that makes the blocks of a page from a record, and from nothing else."""


class Recorder:
    """Writes a benchmark's results: its record, page and drawings, anew at every call.

    Attributes:
        arguments: The options of this run.
        stem: The name of its result files without their endings.
        page: The Markdown that was written last.
    """

    page = ""

    def __init__(self, benchmark: str, arguments: Namespace, label: str, report: Report) -> None:
        self.arguments = arguments
        self.stem = "-".join(filter(None, (benchmark, arguments.name or label)))
        self._benchmark, self._report = benchmark, report
        self._start = Start.now(arguments)

    @property
    def commit(self) -> str | None:
        """The commit that this run measures; it ends in ``-dirty`` if files were changed."""
        return self._start.machine.commit

    def write(self, **results: Any) -> None:
        """Write all results so far; a benchmark may call this as often as it has more."""
        self._write({**self._start.origin(self.arguments), **results})

    def write_part(self, name: str, **results: Any) -> None:
        """Write one part with its own origin, beside the parts that the file has already."""
        file = self.arguments.out / f"{self.stem}.json"
        earlier = read_record(file, self._benchmark)["parts"] if file.is_file() else {}
        part = {**self._start.origin(self.arguments), **results}
        self._write({"parts": {**earlier, name: part}})
        self._start = Start.now(self.arguments)

    def _write(self, content: dict[str, Any]) -> None:
        record = {"benchmark": self._benchmark, **content}
        write_json(self.arguments.out / f"{self.stem}.json", record)
        self.page = write_page(self.arguments.out, self.stem, self._report(record), record)


def run(
    parser: ArgumentParser,
    measure: Callable[[Recorder], None],
    report: Report,
    *,
    label: Callable[[Namespace], str] = model_label,
) -> None:
    """Run a benchmark as its options say.

    Args:
        parser: A parser from :func:`recorder.options.benchmark_parser`, with the script's own
            options.
        measure: Measures, and calls :meth:`Recorder.write` with the results.
        report: Makes the page of a record.
        label: A label of the measurement, for the names of the result files.
    """
    arguments, benchmark = parser.parse_args(), Path(sys.argv[0]).stem
    if arguments.render:
        render(arguments, benchmark, report)
        return
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device here; choose a small shape and --device cpu")
        return
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(getattr(arguments, "seed", 0))
    recorder = Recorder(benchmark, arguments, label(arguments), report)
    measure(recorder)
    print(recorder.page, end="")


def render(arguments: Namespace, benchmark: str, report: Report) -> None:
    """Write the pages of existing records into ``--out``."""
    for file in arguments.render:
        record = read_record(file, benchmark)
        try:
            blocks = report(record)
        except KeyError as error:
            raise InputError(
                f"{file}: lacks {error}, which its page shows; measure it again"
            ) from None
        print(write_page(arguments.out, file.stem, blocks, record), end="")
