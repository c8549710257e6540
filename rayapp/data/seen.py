"""The tasks, files and prompts that a plan was chosen and trained on, kept in its provenance.

A benchmark that calibrated a plan cannot prove it. The record is small enough for ``plan.json``: of
a prompt it keeps 40 bits of a hash, so that one prompt in a hundred thousand is mistaken for
another among 10,000 prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rayapp.data.json_lines import read_objects
from rayapp.data.lines import Line, parse_line
from rayapp.settings import Strict

_DIGITS = 10


class Seen(Strict):
    """The tasks, files (sha256) and prompts (hashes, one text) that chose or trained a plan."""

    tasks: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    prompts: str = ""

    @classmethod
    def of(cls, paths: Iterable[str | Path | None]) -> Seen:
        """The record of calibration and heal files; a file that is not there says nothing."""
        files = [Path(path) for path in paths if path and Path(path).is_file()]
        lines = [
            parse_line(fields, f"{path} line {number}")
            for path in files
            for number, fields in read_objects(path)
        ]
        prompts = {prompt_digest(line.prompt) for line in lines if isinstance(line, Line)}
        prompts |= {prompt_digest(line.prompt) for line in lines if hasattr(line, "choices")}
        return cls(
            tasks=tuple(sorted({line.task for line in lines})),
            files=tuple(sorted({file_digest(path) for path in files})),
            prompts=" ".join(sorted(prompts)),
        )

    @classmethod
    def by(cls, provenance: Mapping[str, Any]) -> Seen:
        """All records of a plan's provenance together, those of its later changes included.

        Of an older plan, which keeps no record, the tasks of its score are known.
        """
        parts = list(_records(provenance))
        by_task = provenance.get("score_by_task")
        tasks = {task for part in parts for task in part.tasks}
        return cls(
            tasks=tuple(sorted(tasks | set(by_task if isinstance(by_task, dict) else ()))),
            files=tuple(sorted({file for part in parts for file in part.files})),
            prompts=" ".join(sorted({p for part in parts for p in part.prompts.split()})),
        )

    def told(self, task: str, files: Iterable[str], prompts: Iterable[str]) -> str:
        """How the plan has seen a task's examples; empty if it has not.

        Args:
            task: The task's name; case, spaces and signs do not count.
            files: The sha256 of the files that its examples come from.
            prompts: Hashes of its prompts (:func:`prompt_digest`).
        """
        if set(files) & set(self.files):
            return "the plan was chosen or trained on this very file"
        known, asked = set(self.prompts.split()), list(prompts)
        shared = sum(prompt in known for prompt in asked)
        if shared:
            return f"the plan was chosen or trained on {shared:,} of these {len(asked):,} prompts"
        if plain_name(task) and plain_name(task) in map(plain_name, self.tasks):
            return "the plan was chosen or trained on other examples of this task"
        return ""


def _records(value: Any) -> Iterator[Seen]:
    """The records anywhere in a provenance; what cannot be read as one is none."""
    if not isinstance(value, Mapping):
        return
    for name, part in value.items():
        if name == "seen":
            try:
                yield Seen.model_validate(part)
            except ValidationError:
                continue
        else:
            yield from _records(part)


def plain_name(task: str) -> str:
    """A task's name without case, spaces and signs: ``ARC-easy`` and ``arc_easy`` are one."""
    return "".join(filter(str.isalnum, task.casefold()))


def plain_text(text: str) -> str:
    """A prompt as it is compared: case and white space do not count."""
    return " ".join(text.casefold().split())


def prompt_digest(prompt: str) -> str:
    """Ten hexadecimal digits of a prompt's hash, of its plain text."""
    return hashlib.sha256(plain_text(prompt).encode()).hexdigest()[:_DIGITS]


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
