"""Every candidate that a search scored, as a Parquet table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from rayapp.pruning.candidates.candidate import Candidate
from rayapp.pruning.candidates.healing import Unit
from rayapp.pruning.search.journal import Trial
from rayapp.pruning.storage import Storage

TRIALS_FILE = "trials.parquet"


def write_trials(
    storage: Storage,
    trials: Sequence[Trial],
    units_of: Callable[[Candidate], Sequence[Unit]] = lambda _: (),
) -> None:
    """Write one row per trial, in the order in which the method got their scores.

    Columns: ``generation``, ``phase``, ``prefill`` and ``decode`` (removed units: ``"3"`` is a
    whole block, ``"3.attention"`` and ``"3.mlp"`` its parts), ``kv`` (transfer rules of its own:
    ``"3:4+0.25 int8"``), ``prefill_removed`` and ``decode_removed`` (blocks), ``healed`` (the
    units of ``units_of``: ``"decode 4 into 5"``), ``score`` (lower is better), ``score/<task>``,
    ``chunks`` that it was scored on (fewer than the most: it lost a race, and ``score`` is an
    estimate), and ``seconds`` of one evaluator.
    """
    columns: dict[str, list[object]] = {
        "generation": [trial.generation for trial in trials],
        "phase": [trial.phase for trial in trials],
        "prefill": [trial.candidate.labels("prefill") for trial in trials],
        "decode": [trial.candidate.labels("decode") for trial in trials],
        "kv": [trial.candidate.kv_labels() for trial in trials],
        "prefill_removed": [trial.candidate.removed("prefill") for trial in trials],
        "decode_removed": [trial.candidate.removed("decode") for trial in trials],
        "healed": [list(map(str, units_of(trial.candidate))) for trial in trials],
        "score": [trial.score.value for trial in trials],
    }
    for task in sorted({task for trial in trials for task in trial.score.tasks}):
        columns[f"score/{task}"] = [trial.score.tasks.get(task) for trial in trials]
    columns["chunks"] = [trial.score.num_chunks for trial in trials]
    columns["seconds"] = [trial.score.seconds for trial in trials]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    storage.write_bytes(TRIALS_FILE, sink.getvalue().to_pybytes())
