"""The journal of a search: JSON lines, one per generation, so that a killed search can go on.

The first line identifies the search. The measurements that it starts from follow (the influence,
the Hessian in the gates), then every generation with its scores. Numbers are written so that they
read back bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rayapp.errors import InputError, SearchError
from rayapp.plan import is_outdated, renewal_hint
from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.evaluator.objective import Score
from rayapp.pruning.measures.gate_hessian import GateHessian
from rayapp.pruning.measures.influence import Influence
from rayapp.pruning.storage import Storage

JOURNAL_FILE = "journal.jsonl"
VERSION = 2


@dataclass(frozen=True)
class Trial:
    """One candidate, scored."""

    candidate: Candidate
    score: Score
    generation: int
    phase: str

    def record(self) -> dict[str, Any]:
        """The trial as JSON, without the generation's number and phase."""
        kv = {"kv": [list(rule) for rule in self.candidate.kv]} if self.candidate.kv else {}
        return {
            "prefill": list(self.candidate.prefill),
            "decode": list(self.candidate.decode),
            **kv,
            "score": self.score.value,
            "tasks": self.score.tasks,
            "chunks": self.score.num_chunks,
            "seconds": round(self.score.seconds, 6),
        }


class Journal:
    """Appends to, and replays, one journal.

    Args:
        storage: The directory that the journal lies in.
        header: The search's identity, two levels deep; a journal of another header is refused.
        environment: The environment of the run: recorded beside the header, but not compared.
        resume: Whether to go on from an existing journal.

    Raises:
        InputError: A journal exists and ``resume`` is not set, or it belongs to another search (the
            differences are named).
    """

    def __init__(
        self,
        storage: Storage,
        header: Mapping[str, Any],
        *,
        environment: Mapping[str, Any],
        resume: bool,
    ) -> None:
        self._storage = storage
        self.influence: Influence | None = None
        self.gate_hessian: GateHessian | None = None
        self.generations: list[list[Trial]] = []
        there = storage.exists(JOURNAL_FILE)
        if there and not resume:
            raise InputError(
                f"{storage.location}/{JOURNAL_FILE}: a search was already written here; go on "
                "with --resume, or give another --out"
            )
        first = {"kind": "header", "version": VERSION, **json.loads(json.dumps(header))}
        lines = self._read() if there else []
        if lines:
            _check_header(lines[0], first, f"{storage.location}/{JOURNAL_FILE}")
            self._replay(lines[1:])
        kept = lines or [{**first, "environment": dict(environment)}]
        storage.write_bytes(JOURNAL_FILE, b"".join(map(_encode, kept)))

    def add_influence(self, influence: Influence) -> None:
        """Record the influence that the search starts from."""
        self.influence = influence
        self._append({"kind": "influence", **asdict(influence)})

    def add_gate_hessian(self, gate_hessian: GateHessian) -> None:
        """Record the Hessian in the gates that the search starts from."""
        self.gate_hessian = gate_hessian
        self._append({"kind": "gate_hessian", **asdict(gate_hessian)})

    def add_generation(self, trials: Sequence[Trial]) -> None:
        """Record one generation's scores; they are on disk when this returns."""
        self.generations.append(list(trials))
        records = [trial.record() for trial in trials]
        phase = trials[0].phase
        index = trials[0].generation
        self._append({"kind": "generation", "index": index, "phase": phase, "trials": records})

    def _append(self, line: Mapping[str, Any]) -> None:
        self._storage.append_bytes(JOURNAL_FILE, _encode(line))

    def _read(self) -> list[dict[str, Any]]:
        """Read all whole lines; a torn last one, as a kill leaves it, is dropped."""
        *whole, _torn = self._storage.read_text(JOURNAL_FILE).split("\n")
        lines = []
        for number, text in enumerate(whole, start=1):
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{self._storage.location}/{JOURNAL_FILE} line {number}: not JSON "
                    f"({error.msg}); delete this line and all after it, or give another --out"
                ) from None
        return lines

    def _replay(self, lines: Sequence[Mapping[str, Any]]) -> None:
        for line in lines:
            if line["kind"] == "influence":
                values = {k: tuple(v) for k, v in line.items() if k != "kind"}
                self.influence = Influence(**values)
            elif line["kind"] == "gate_hessian":
                self.gate_hessian = GateHessian(tuple(map(tuple, line["rows"])))
            else:
                self.generations.append([_trial(line, record) for record in line["trials"]])


def _trial(line: Mapping[str, Any], record: Mapping[str, Any]) -> Trial:
    kv = tuple(tuple(rule) for rule in record.get("kv", ()))
    candidate = Candidate(tuple(record["prefill"]), tuple(record["decode"]), kv)
    score = Score(
        record["score"],
        record["tasks"],
        seconds=record["seconds"],
        num_chunks=record["chunks"],
    )
    return Trial(candidate, score, line["index"], line["phase"])


def _check_header(written: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    differing = _differences({k: v for k, v in written.items() if k != "environment"}, wanted)
    prints = [
        header.get("model", {}).get("weights_fingerprint", "") for header in (written, wanted)
    ]
    if len(differing) == 1 and is_outdated(*prints):
        raise InputError(f"{where}: the search {renewal_hint(where.rpartition('/')[0])}")
    if differing:
        raise InputError(
            f"{where}: belongs to another search ({'; '.join(differing)}); repeat its settings to "
            "go on, or give another --out"
        )


def _differences(written: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    lines = []
    for key in sorted({*written, *wanted}):
        old, new = written.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += [f"{key}.{difference}" for difference in _differences(old, new)]
        elif old != new:
            lines.append(f"{key}: journal {old!r}, now {new!r}")
    return lines


def check_replayed(proposed: Sequence[Candidate], trials: Sequence[Trial]) -> None:
    """Raise :class:`SearchError` where a method asks for other candidates than its journal says."""
    if list(proposed) != [trial.candidate for trial in trials]:
        raise SearchError(
            f"generation {trials[0].generation} of the journal scored {trials[0].candidate} and "
            f"others, but the search now asks for {proposed[0]}: the journal was edited, or is of "
            "another version; start again with another --out"
        )


def _encode(line: Mapping[str, Any]) -> bytes:
    return (json.dumps(line, allow_nan=False) + "\n").encode()


def journal_influence(text: str) -> Influence | None:
    """The influence that a search's journal records, if any."""
    for line in text.splitlines():
        if not line.startswith('{"kind": "influence"'):
            continue
        try:
            values: dict[str, Any] = json.loads(line)
            return Influence(**{k: tuple(v) for k, v in values.items() if k != "kind"})
        except (ValueError, TypeError):
            return None
    return None
