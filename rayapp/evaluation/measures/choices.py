"""Multiple choice: the continuation of a prompt that both stages together make likeliest.

The measures are defined as in lm-evaluation-harness (v0.4, ``multiple_choice``): ``acc`` is the
share of questions whose right choice has the highest summed log-likelihood; ``acc_norm`` divides
the sum by the number of characters of the choice first. Ties go to the first choice. No end marker
is scored.

The prompt runs through prefill once, and its KV is handed over to every choice in decode. A choice
continues the prompt as written, so most begin with a space; spaces at its start are not counted as
characters, since the harness puts them between prompt and choice.
Questions of many lengths run together, and padding is not run.
Shapes: B = prompts of equal length, R = choices of all of them, C = tokens of a choice (padded on
the right), N = tokens of all choices, E = hidden size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from rayapp.data.lines import ChoiceLine
from rayapp.errors import DataError
from rayapp.evaluation.bootstrap import Bound, upper_bound
from rayapp.evaluation.measures.likelihood import BATCH_TOKENS, TwoStages, joined_groups
from rayapp.evaluation.measures.prompt_bytes import PromptBytes
from rayapp.evaluation.result import ChoiceResult
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.models.likelihood import nll, slice_tokens


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt and its choices, their ``num_characters``, and the right choice."""

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    num_characters: tuple[int, ...]
    answer: int
    task: str


def tokenize_question(
    line: ChoiceLine, tokenizer: PreTrainedTokenizerBase, where: str, max_positions: int
) -> Question:
    """Tokenise a question as lm-evaluation-harness does.

    Spaces that end the prompt go to the choices. A choice's tokens are those that prompt and choice
    together have beyond the prompt's own. If the tokenizer merges over the seam, the choice is
    tokenised by itself (the harness would lose characters).

    Raises:
        DataError: Prompt or a choice has no token, or they exceed the model's context together.
    """
    context = line.prompt.rstrip()
    spaces = line.prompt[len(context) :]
    prompt = _ids(tokenizer, context)
    choices = [_continuation(tokenizer, context, prompt, spaces + each) for each in line.choices]
    if not prompt or not all(choices):
        raise DataError(
            f"{where}: the prompt or a choice has no token; give text that the tokenizer knows"
        )
    longest = max(map(len, choices))
    if len(prompt) + longest > max_positions:
        raise DataError(
            f"{where}: {len(prompt)} prompt tokens + {longest} of a choice exceed the model's "
            f"context of {max_positions}; shorten the line (fewer shots)"
        )
    num_characters = tuple(len(choice.lstrip()) for choice in line.choices)
    return Question(tuple(prompt), tuple(choices), num_characters, line.answer, line.task)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, verbose=False)["input_ids"])


def _continuation(
    tokenizer: PreTrainedTokenizerBase, context: str, prompt: tuple[int, ...], text: str
) -> tuple[int, ...]:
    whole = _ids(tokenizer, context + text)
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def choice_likelihoods(
    side: TwoStages, questions: Sequence[Question]
) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Summed log-likelihood of every choice, in nats; yields ``(index, sums)`` in any order."""
    for group in question_groups(questions):
        counts = [torch.tensor([len(questions[i].choices) for i in batch]) for batch in group]
        rows = [[c for i in batch for c in questions[i].choices] for batch in group]
        prompts = [torch.tensor([questions[i].prompt for i in batch]) for batch in group]
        handed = [
            each.repeated(counts_B)
            for each, counts_B in zip(side.hand_over_all(prompts), counts, strict=True)
        ]
        lengths = [torch.tensor([len(choice) for choice in each]) for each in rows]
        states_NE = side.predicting_states(handed, [_padded(each) for each in rows], lengths)
        ids_N = torch.tensor([token for each in rows for choice in each for token in choice])
        values_N = -_token_nll(side, states_NE, ids_N)
        sums = iter([float(row.sum()) for row in values_N.split(torch.cat(lengths).tolist())])
        for index in (index for batch in group for index in batch):
            yield index, tuple(next(sums) for _ in questions[index].choices)


def _padded(choices: Sequence[tuple[int, ...]]) -> torch.Tensor:
    padded_RC = torch.zeros((len(choices), max(map(len, choices))), dtype=torch.int64)
    for row, ids in enumerate(choices):
        padded_RC[row, : len(ids)] = torch.tensor(ids)
    return padded_RC


@torch.inference_mode()
def _token_nll(side: TwoStages, states_NE: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
    """NLL ``(N,)`` of every token, by slices that bound the memory of logits."""
    step = slice_tokens(side.decode.vocab_size)
    parts = [
        nll(
            side.decode.logits(states_NE[None, start : start + step])[0],
            ids_N[start : start + step],
        )
        for start in range(0, len(ids_N), step)
    ]
    return torch.cat(parts).cpu()


def question_groups(questions: Sequence[Question]) -> Iterator[list[list[int]]]:
    """Batches of :func:`question_batches` that run end to end."""

    def num_tokens(batch: list[int]) -> int:
        return sum(_num_tokens(questions[index]) for index in batch)

    return joined_groups(question_batches(questions), num_tokens)


def question_batches(questions: Sequence[Question]) -> Iterator[list[int]]:
    """Indices of questions with equally long prompts; every choice has a prompt's KV."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        by_length[len(question.prompt)].append(index)
    for _, group in sorted(by_length.items()):
        widest = max(_num_tokens(questions[i]) for i in group)
        size = max(1, BATCH_TOKENS // widest)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _num_tokens(question: Question) -> int:
    return len(question.choices) * (len(question.prompt) + max(map(len, question.choices)))


@dataclass(frozen=True)
class AnsweredQuestions:
    """The log-likelihoods of one task on both sides, by question and choice.

    ``by_prefill`` says whether the plan's prefill computes the first token of every choice.
    """

    questions: Sequence[Question]
    dense: Sequence[tuple[float, ...]]
    plan: Sequence[tuple[float, ...]]
    sent: PromptBytes
    by_prefill: bool = True

    @property
    def decode_share(self) -> float:
        """Share of the choices' tokens that decode computed; prefill may make the first ones."""
        lengths = [len(choice) for question in self.questions for choice in question.choices]
        return 1 - self.by_prefill * len(lengths) / sum(lengths)

    def right(self, sums: Sequence[tuple[float, ...]], *, by_character: bool) -> list[bool]:
        """Whether the right choice is the likeliest, question by question."""
        return [
            _likeliest(q, s, by_character=by_character) == q.answer
            for q, s in zip(self.questions, sums, strict=True)
        ]

    def points_lost(self, *, by_character: bool) -> list[float]:
        """Percentage points lost, question by question: 100, 0 or -100."""
        dense = self.right(self.dense, by_character=by_character)
        plan = self.right(self.plan, by_character=by_character)
        return [100.0 * (d - p) for d, p in zip(dense, plan, strict=True)]


def _likeliest(question: Question, sums: tuple[float, ...], *, by_character: bool) -> int:
    lengths = question.num_characters if by_character else (1,) * len(sums)
    scores = [total / length for total, length in zip(sums, lengths, strict=True)]
    return scores.index(max(scores))


def choice_result(
    task: str, groups: Sequence[AnsweredQuestions], settings: EvaluationSettings
) -> ChoiceResult:
    """One row of the result: a task, or the mean over tasks."""

    def accuracy(side: str, *, by_character: bool) -> float:
        shares = [
            sum(right) / len(right)
            for right in (g.right(getattr(g, side), by_character=by_character) for g in groups)
        ]
        return sum(shares) / len(shares)

    def lost(*, by_character: bool) -> Bound:
        return upper_bound(
            [group.points_lost(by_character=by_character) for group in groups],
            seed=settings.seed,
            num_resamples=settings.num_resamples,
        )

    lengths = [len(question.prompt) for group in groups for question in group.questions]
    return ChoiceResult(
        task=task,
        num_examples=len(lengths),
        min_prompt_tokens=min(lengths),
        max_prompt_tokens=max(lengths),
        dense_acc=accuracy("dense", by_character=False),
        plan_acc=accuracy("plan", by_character=False),
        acc_lost=lost(by_character=False),
        dense_acc_norm=accuracy("dense", by_character=True),
        plan_acc_norm=accuracy("plan", by_character=True),
        acc_norm_lost=lost(by_character=True),
        decode_share=sum(group.decode_share for group in groups) / len(groups),
        **PromptBytes.total(group.sent for group in groups).fields(),
    )
