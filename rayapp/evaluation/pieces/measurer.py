"""Tasks measured piece by piece, and put together again in the order of their examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rayapp.data.conversations import chat_prompt
from rayapp.data.lines import TokenizedLine
from rayapp.evaluation.measures.choices import AnsweredQuestions, Question
from rayapp.evaluation.measures.completions import JudgedCompletions
from rayapp.evaluation.measures.perplexity import ScoredWindows, Windows
from rayapp.evaluation.measures.rollouts import Opening, Rollout
from rayapp.evaluation.pieces.compute import PieceCompute
from rayapp.evaluation.pieces.journal import Journal
from rayapp.evaluation.pieces.piece import (
    OF_DENSE,
    Done,
    Piece,
    answer_pieces,
    choice_pieces,
    likelihood_pieces,
    rollout_pieces,
)
from rayapp.evaluation.progress import ProgressCallback, silent
from rayapp.evaluation.result import LatencyResult
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.sides import Sides
from rayapp.plan import PruningPlan


class Measurer:
    """Measures tasks of every kind for one plan.

    Args:
        compute: The place where pieces are computed; it learns the plan.
        plan: The plan beside the dense model.
        settings: Sizes of batches.
        progress: Called as pieces are done.
        journal: The pieces that were measured before, and are not measured again.
        of_dense: The same for pieces of the dense model alone, which many plans share; without it,
            they stand in ``journal``.
    """

    def __init__(
        self,
        compute: PieceCompute,
        plan: PruningPlan,
        settings: EvaluationSettings,
        progress: ProgressCallback = silent,
        journal: Journal | None = None,
        of_dense: Journal | None = None,
    ) -> None:
        compute.use(plan)
        self._compute, self._settings, self._progress = compute, settings, progress
        self._journal = journal or Journal(None, {})
        self._of_dense = of_dense or self._journal
        self._by_prefill = plan.first_token == "prefill"

    def completions(self, task: str, lines: Sequence[TokenizedLine]) -> JudgedCompletions:
        """Measure likelihoods, then greedy answers through the engine that serves."""
        sums = self._measured(f"{task}: likelihood", list(likelihood_pieces(lines)))
        dense = self._answers(task, "dense answers", lines)
        plan = self._answers(task, "plan answers", lines)
        return JudgedCompletions(lines, sums, dense, plan, by_prefill=self._by_prefill)

    def _answers(
        self,
        task: str,
        kind: Literal["dense answers", "plan answers"],
        lines: Sequence[TokenizedLine],
    ) -> list[Any]:
        pieces = answer_pieces(kind, lines, max_num_seqs=self._settings.max_num_seqs)
        return self._measured(f"{task}: {kind}", list(pieces))

    def choices(self, task: str, questions: Sequence[Question]) -> AnsweredQuestions:
        """Log-likelihoods of all choices."""
        dense = self._choices(task, "dense choices", questions)
        plan = self._choices(task, "plan choices", questions)
        lengths = [len(question.prompt) for question in questions]
        sent = self._compute.measure(Sides.prompt_bytes, lengths)
        return AnsweredQuestions(questions, dense, plan, sent, by_prefill=self._by_prefill)

    def _choices(
        self,
        task: str,
        kind: Literal["dense choices", "plan choices"],
        questions: Sequence[Question],
    ) -> list[Any]:
        return self._measured(f"{task}: {kind}", list(choice_pieces(kind, questions)))

    def texts(self, task: str, windows: Windows) -> ScoredWindows:
        """Likelihoods of all windows."""
        sums = self._measured(f"{task}: windows", list(likelihood_pieces(windows.lines)))
        lengths = [len(line.prompt) for line in windows.lines]
        sent = self._compute.measure(Sides.prompt_bytes, lengths)
        return ScoredWindows(windows, sums, sent, by_prefill=self._by_prefill)

    def rollouts(self, what: str, openings: Sequence[Opening]) -> list[Rollout]:
        """Greedy answers, and the plan along the dense model's."""
        size = self._settings.max_num_seqs
        return self._measured(
            f"{what}: rollouts", list(rollout_pieces(openings, max_num_seqs=size))
        )

    def latency(
        self, batch_size: int, length: tuple[int, int], image: Path | None = None
    ) -> LatencyResult:
        """Interleaved timings of one batch size and length, on one evaluator."""
        what = f"timing, batch {batch_size}, {length[0]} in, {length[1]} out"
        self._progress(what, 0, 1)
        timed = self._compute.measure(Sides.latency, batch_size, length, image)
        self._progress(what, 1, 1)
        return timed

    def _measured(self, what: str, pieces: Sequence[Piece]) -> list[Any]:
        """The values of all examples, in their order."""
        values: dict[int, Any] = {}
        total = sum(len(piece.places) for piece in pieces)

        def keep(done: Done) -> None:
            values.update(zip(done.piece.places, done.values, strict=True))

        waiting = []
        for piece in pieces:
            known = self._journal_of(piece).known(piece)
            if known is None:
                waiting.append(piece)
            else:
                keep(Done(piece, known, 0.0))
        self._progress(what, len(values), total)
        for done in self._compute.run(waiting):
            self._journal_of(done.piece).add(done)
            keep(done)
            self._progress(what, len(values), total)
        return [values[place] for place in range(total)]

    def _journal_of(self, piece: Piece) -> Journal:
        return self._of_dense if piece.kind in OF_DENSE else self._journal


def second_openings(
    openings: Sequence[Opening], rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase
) -> list[Opening]:
    """The prompts of second turns: the conversation so far, with the dense model's first answer."""
    seconds = []
    for opening, rollout in zip(openings, rollouts, strict=True):
        if opening.turns is not None:
            answer = tokenizer.decode(list(rollout.dense), skip_special_tokens=True)
            said = [opening.turns[0], str(answer), opening.turns[1]]
            prompt = chat_prompt(tokenizer, said, "a second turn")
            seconds.append(Opening(prompt, "second turn"))
    return seconds
