"""``kv.json``: a selection's measurements and choice, and every set of KV that it scored.

The file is written after every generation, so a selection that was killed, or could not meet its
goal, has lost nothing: the next one with the same plan, model and lines reuses the scores, whatever
its goal.
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
    """One ``kv.json``, read and written.

    Args:
        storage: The directory that the file lies in.
        subject: Everything but the set that scores depend on; scores of another subject are
            dropped.

    Attributes:
        trials: Scores by the rules of a set, those of earlier selections included.
        num_replayed: Number of scores that the file had before.

    Raises:
        InputError: A file of this name exists, but rayapp did not write it.
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
        """Add one score; :meth:`write` puts it on disk."""
        self.trials[candidate.kv] = score

    def write(self, **body: Any) -> None:
        """Write all scores, with these entries added to those of earlier calls."""
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
