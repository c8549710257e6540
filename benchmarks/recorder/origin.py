"""The origin of numbers: options in words, machine, commit and day."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rayapp.evaluation.machine import Machine, this_machine
from rayapp.models.hub import from_directory
from recorder.options import configuration_of


@dataclass(frozen=True)
class Start:
    """The moment at which a measurement began, and the state of the machine at that moment."""

    machine: Machine
    date: datetime = field(default_factory=lambda: datetime.now(UTC))
    wall_s: float = field(default_factory=time.perf_counter)
    cpu_s: float = field(default_factory=time.process_time)
    load: float = field(default_factory=lambda: os.getloadavg()[0])

    @classmethod
    def now(cls, arguments: Namespace) -> Start:
        """Begin; the commit is read here, because a checkout may move during a long run."""
        on_gpu = arguments.device.startswith("cuda")
        device = torch.cuda.get_device_name(arguments.device) if on_gpu else arguments.device
        return cls(this_machine(device=device, num_threads=arguments.threads))

    def origin(self, arguments: Namespace) -> dict[str, Any]:
        """The origin of a measurement that ends now, for its record."""
        return {
            "date": self.date.isoformat(timespec="seconds"),
            "configuration": configuration_of(arguments),
            **_captions(arguments),
            "machine": self.machine.model_dump(),
            "load_average": [self.load, os.getloadavg()[0]],
            "wall_s": time.perf_counter() - self.wall_s,
            "cpu_s": time.process_time() - self.cpu_s,
        }


def _captions(arguments: Namespace) -> dict[str, Any]:
    """The captions of the run's models, for the few that have one."""
    models = getattr(arguments, "model", None) or []
    paths = models if isinstance(models, list) else [models]
    captions = [from_directory(path).caption for path in paths if Path(path).is_dir()]
    return {"captions": kept} if (kept := list(filter(None, captions))) else {}


def measured_on(origin: Mapping[str, Any]) -> str:
    """The origin of the numbers, as one sentence for a page.

    Older records lack a date, a load, or seconds. Rows that were kept from earlier runs have
    commits of their own, which the sentence names.
    """
    machine = origin["machine"]
    words = [machine["processor"]]
    if machine["device"] != "cpu":
        words.append(machine["device"])
    words.append(threads(machine["num_threads"]))
    kept = sorted(set(_commits_of_rows(origin)))
    if "load_average" in origin and not kept:
        words.append("load average {:.1f} to {:.1f}".format(*origin["load_average"]))
    if "cpu_s" in origin and not kept:
        words.append(f"{origin['cpu_s']:,.0f} s of CPU")
    words += [f"{name} {machine['versions'][name]}" for name in ("torch", "transformers")]
    if "date" in origin and not kept:
        words.append(origin["date"][:10])
    commits = kept or [str(machine["commit"])]
    words.append(f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}")
    of = f"{', '.join(origin['captions'])}. " if origin.get("captions") else ""
    return f"{of}Measured on {', '.join(words)}."


def type_words(dtype: str) -> str:
    """The element type in words."""
    return "in the checkpoint's own type" if dtype == "auto" else dtype


def threads(count: int) -> str:
    """The number of threads in words."""
    return "one thread" if count == 1 else f"{count} threads"


def _commits_of_rows(content: Any) -> Iterator[str]:
    """The commits that rows kept from earlier runs were measured at."""
    if isinstance(content, Mapping):
        if "commit" in content and "versions" not in content:
            yield str(content["commit"])
        content = list(content.values())
    if isinstance(content, list):
        for each in content:
            yield from _commits_of_rows(each)
