"""``kv.json``: what a selection of KV measured and chose, and every set that it scored.

It is written after every generation, so a selection that was killed, or could not meet its goal,
has lost nothing: the next one with the same plan, model and lines finds the scores, whatever its
goal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rayapp.errors import InputError
from rayapp.pruning.candidates.candidate import Candidate, KVRule
from rayapp.pruning.evaluator.objective import Score
from rayapp.pruning.storage import Storage

KV_FILE = "kv.json"
VERSION = 1


class KVRecord:
    """One ``kv.json``.

    Args:
        storage: Where it lies.
        subject: What scores depend on beside the set; scores of another subject are dropped.

    Attributes:
        trials: Scores by the rules of a set, those of earlier selections included.
        num_replayed: How many of them were there before.

    Raises:
        InputError: A file of this name is there, but is none of ours.
    """

    def __init__(self, storage: Storage, subject: Mapping[str, Any]) -> None:
        self._storage = storage
        self._subject = {"version": VERSION, **json.loads(json.dumps(subject))}
        self._body: dict[str, Any] = {}
        self.trials: dict[tuple[KVRule, ...], Score] = {}
        if storage.exists(KV_FILE):
            self._read()
        self.num_replayed = len(self.trials)

    def add(self, candidate: Candidate, score: Score) -> None:
        """Take one score; :meth:`write` keeps it."""
        self.trials[candidate.kv] = score

    def write(self, **body: Any) -> None:
        """Write what is known, with these entries added to what was given before."""
        self._body |= body
        content = {
            "complete": False,
            **self._body,
            "subject": self._subject,
            "trials": [
                {"kv": [list(rule) for rule in kv], "score": score.value, "tasks": score.tasks}
                for kv, score in self.trials.items()
            ],
        }
        self._storage.write_bytes(KV_FILE, (json.dumps(content, indent=1) + "\n").encode())

    def _read(self) -> None:
        where = f"{self._storage.location}/{KV_FILE}"
        try:
            content = json.loads(self._storage.read_text(KV_FILE))
            if content["subject"] != self._subject:
                return
            for trial in content["trials"]:
                kv = tuple((b, f, last, e) for b, f, last, e in trial["kv"])
                self.trials[kv] = Score(trial["score"], trial["tasks"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{where}: is no record of a selection ({error}); move it away, or give another "
                "--out"
            ) from None
