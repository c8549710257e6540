"""The subject of a demo: a model, the sizes of the steps, and the origin of its lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


class Files:
    """The files that the demo leaves in its directory."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.calibration = out / "data" / "calibration.jsonl"
        self.test = out / "data" / "test.jsonl"
        self.plan = out / "plan.json"
        self.journal = out / "journal.jsonl"
        self.trials = out / "trials.parquet"
        self.log = out / "search.log"
        self.evaluation = out / "evaluation.json"
        self.answers = out / "answers.jsonl"
        self.ledger = out / "ledger.json"
        self.report = out / "report.html"


@dataclass(frozen=True)
class AskedQuestion:
    """A question for the service, with the answer that counts as right.

    Attributes:
        prompt: The whole prompt, as it is sent.
        answer: The right answer.
        task: The task that it belongs to.
        shown: The question in a few words, for the terminal.
    """

    prompt: str
    answer: str
    task: str
    shown: str


@dataclass(frozen=True)
class Subject:
    """A model that the demo runs on.

    Attributes:
        name: The name under which it is served.
        model: The model as commands take it, on any machine: a directory, or a pinned Hub id.
        directory: The model's directory on this machine.
        prefill_remove: Number of blocks that prefill loses.
        decode_remove: Number of blocks that decode loses.
        evaluations: Number of candidates that the search may score.
        timed_runs: Interleaved timings of dense and plan.
        max_model_len: Limit of the service for prompt and answer together, in tokens.
        max_answer_tokens: Most tokens of an answer of the service.
        what_is_evaluated: The evaluation's examples in words.
        write_lines: A function that writes both files of lines, and returns the questions that the
            service is asked.
    """

    name: str
    model: str
    directory: Path
    prefill_remove: int
    decode_remove: int
    evaluations: int
    timed_runs: int
    max_model_len: int
    max_answer_tokens: int
    what_is_evaluated: str
    write_lines: Callable[[Files], Sequence[AskedQuestion]]
