"""Exact match of many ways to prune visual tokens, side by side on the same questions.

Exact match is teacher-forced: every token of the answer, end marker included, is the likeliest
after the right ones before it, which is what greedy decoding needs to write that answer. So a
question takes one forward pass per rule, prompt and answer together. Prompts of equal length run as
one batch, whatever their rule and image. The matches equal those of the serving path, prefill and
decode of one prompt (tested), near ties between batch shapes aside.
Shapes: B = prompts of T tokens, C = answer tokens, V = vocabulary, R = rules, L = lines.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from rayapp.data.image_lines import TokenizedImageLine
from rayapp.evaluation.measures.likelihood import BATCH_TOKENS
from rayapp.evaluation.progress import ProgressCallback, silent
from rayapp.evaluation.visual.prompts import VisualPrompts
from rayapp.kv.cache import CaptureCache
from rayapp.models.stack import BlockStack
from rayapp.plan import VisualTokens
from rayapp.vision.prompt import PromptEmbeddings

Matches = NDArray[np.bool_]


def visual_matches(
    prompts: VisualPrompts,
    rules: Sequence[VisualTokens | None],
    lines: Sequence[TokenizedImageLine],
    *,
    end_token_ids: Sequence[int] = (),
    progress: ProgressCallback = silent,
) -> Matches:
    """Exact matches by rule and question, ``(R, L)``.

    Args:
        prompts: The prompts of the stage that answers.
        rules: The rules of pruning; None keeps everything.
        lines: The questions.
        end_token_ids: Tokens that may stand for the end marker beside the expected one.
        progress: Called question by question.

    Raises:
        PlanError: A rule cannot be applied to this model.
    """
    batches = _Batches(prompts.stack, lines, end_token_ids, len(rules))
    order = sorted(range(len(lines)), key=lambda index: lines[index].images)
    for done, index in enumerate(order, start=1):
        question = prompts.ask(lines[index])
        for number, rule in enumerate(rules):
            batches.add(number, index, question.embed(rule))
        progress("questions", done, len(lines))
    return batches.finished()


class _Batches:
    """Prompts that wait for others of their length, and the matches so far."""

    def __init__(
        self,
        stack: BlockStack,
        lines: Sequence[TokenizedImageLine],
        end_token_ids: Sequence[int],
        num_rules: int,
    ) -> None:
        self._stack, self._lines, self._ends = stack, lines, end_token_ids
        self._waiting: dict[tuple[int, int], list[tuple[int, int, PromptEmbeddings]]] = defaultdict(
            list
        )
        self._found = np.zeros((num_rules, len(lines)), dtype=np.bool_)

    def add(self, rule: int, index: int, prompt: PromptEmbeddings) -> None:
        """Add a question under a rule; its batch runs as soon as it is full."""
        num_answer = len(self._lines[index].continuation)
        key = (prompt.num_tokens, num_answer)
        self._waiting[key].append((rule, index, prompt))
        if len(self._waiting[key]) * (prompt.num_tokens + num_answer) >= BATCH_TOKENS:
            self._run(key)

    def finished(self) -> Matches:
        """All matches, once the prompts that still wait are run."""
        for key in list(self._waiting):
            self._run(key)
        return self._found

    def _run(self, key: tuple[int, int]) -> None:
        batch = self._waiting.pop(key)
        answers = [self._lines[index].continuation for _, index, _ in batch]
        logits_BCV = answer_logits(self._stack, [prompt for _, _, prompt in batch], answers)
        likeliest_BC = logits_BCV.argmax(dim=-1).tolist()
        for (rule, index, _), given, expected in zip(batch, likeliest_BC, answers, strict=True):
            ends = given[-1] in (expected[-1], *self._ends)
            self._found[rule, index] = given[:-1] == list(expected[:-1]) and ends


@torch.inference_mode()
def answer_logits(
    stack: BlockStack, prompts: Sequence[PromptEmbeddings], answers: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Logits ``(B, C, V)`` that predict the answer tokens; row ``i`` saw the tokens before it.

    Args:
        stack: Runs prompts and answers.
        prompts: Prompts of equal length.
        answers: Answers of equal length, one per prompt.
    """
    answers_BC = torch.tensor([list(answer) for answer in answers])
    num_answer = answers_BC.shape[1]
    prompts_BTE = torch.stack([prompt.hidden_TE for prompt in prompts])
    hidden_BTE = torch.cat([prompts_BTE, stack.embed(answers_BC[:, :-1])], dim=1)
    steps = torch.arange(num_answer - 1)
    positions_BT = torch.stack(
        [torch.cat([prompt.positions_T, prompt.next_position + steps]) for prompt in prompts]
    )
    hidden_BTE = stack.run(hidden_BTE, positions_BT, CaptureCache.for_stack(stack))
    return stack.logits(hidden_BTE[:, -num_answer:])
