"""Stage-aware perplexity: text in windows, the first part through prefill, the rest through decode.

The texts of a task are joined by a blank line, as the peers join WikiText-2, tokenised once, and
cut into windows of equal size. The first tokens of a window are the prompt, the others are scored,
teacher-forced through decode. The prompt of the next window is the text before the first token
without a score, so every token is scored exactly once, except those of the first prompt. A text
shorter than a window is one window, divided in the same proportion.

Perplexity is ``exp`` of the mean NLL per scored token. Every token sees at least a prompt's length
of text, so this perplexity lies below that of windows whose tokens see only their own window:
compare it with its dense neighbour, never with another paper's figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from rayapp.data.lines import TokenizedLine
from rayapp.errors import DataError, InputError
from rayapp.evaluation.bootstrap import upper_bound
from rayapp.evaluation.measures.likelihood import LineLikelihood
from rayapp.evaluation.measures.prompt_bytes import PromptBytes
from rayapp.evaluation.result import TextResult
from rayapp.evaluation.settings import EvaluationSettings

DEFAULT_WINDOW = 2_048
"""Number of tokens of a window if the model's context allows it: the peers' usual size."""
SEPARATOR = "\n\n"


class TextLine(BaseModel):
    """A line of a text file; an empty text is a blank paragraph."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    text: str
    task: str = ""


@dataclass(frozen=True)
class Windows:
    """The windows of one task.

    Attributes:
        lines: Every window's prompt and scored tokens.
        num_window_tokens: Number of tokens of a whole window; the last may be shorter.
        num_prompt_tokens: Number of a window's tokens that prefill runs.
        num_context_tokens: Number of tokens of the text that are never scored: the first prompt.
        num_left_out: Number of tokens of the text beyond the limit of windows.
    """

    lines: tuple[TokenizedLine, ...]
    num_window_tokens: int
    num_prompt_tokens: int
    num_context_tokens: int
    num_left_out: int


def cut_windows(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: EvaluationSettings,
    max_positions: int,
    task: str = "",
) -> Windows:
    """Join, tokenise and cut the texts of one task; nothing is dropped without being counted.

    Raises:
        InputError: The window of the settings exceeds the model's context.
        DataError: The texts have fewer than two tokens, so none can be scored.
    """
    wanted = settings.num_window_tokens
    if wanted is not None and wanted > max_positions:
        raise InputError(
            f"num_window_tokens={wanted} exceeds the model's context of {max_positions}; lower it"
        )
    ids = tuple(tokenizer(SEPARATOR.join(texts), verbose=False)["input_ids"])
    if len(ids) < 2:
        raise DataError(
            f"the texts of {f'task {task!r}' if task else 'the nameless task'} hold {len(ids)} "
            "tokens; perplexity needs at least 2"
        )
    window = min(wanted or DEFAULT_WINDOW, max_positions, len(ids))
    num_prompt = min(max(1, round(settings.window_prompt_share * window)), window - 1)
    starts = range(0, len(ids) - num_prompt, window - num_prompt)
    kept = starts[: settings.limit]
    lines = tuple(
        TokenizedLine(ids[s : s + num_prompt], ids[s + num_prompt : s + window], task, ends=False)
        for s in kept
    )
    num_scored = sum(len(line.continuation) for line in lines)
    return Windows(lines, window, num_prompt, num_prompt, len(ids) - num_prompt - num_scored)


@dataclass(frozen=True)
class ScoredWindows:
    """The windows of one task, with their scores on both sides.

    ``by_prefill`` says whether the plan's prefill computes the first token of every window.
    """

    windows: Windows
    likelihoods: Sequence[LineLikelihood]
    sent: PromptBytes
    by_prefill: bool = True

    @property
    def decode_share(self) -> float:
        """Share of the scored tokens that decode computed; prefill may make the first ones."""
        return 1 - self.by_prefill * len(self.likelihoods) / sum(self.num_tokens)

    @property
    def num_tokens(self) -> list[float]:
        """Number of scored tokens, window by window."""
        return [float(sums.num_tokens) for sums in self.likelihoods]

    @property
    def nll_lost(self) -> list[float]:
        """NLL of the plan minus NLL of the dense model, window by window, in nats per token."""
        return [(s.plan_nll - s.dense_nll) / s.num_tokens for s in self.likelihoods]

    @property
    def token_kl(self) -> list[float]:
        """KL, window by window, in nats per token."""
        return [sums.kl / sums.num_tokens for sums in self.likelihoods]

    def nll(self, side: str) -> float:
        """Nats per token of ``dense_nll`` or ``plan_nll``."""
        return math.fsum(getattr(s, side) for s in self.likelihoods) / sum(self.num_tokens)


def text_result(
    task: str, groups: Sequence[ScoredWindows], settings: EvaluationSettings
) -> TextResult:
    """One row of the result: a task, or the mean over tasks.

    The mean of NLL makes the perplexity a geometric mean.
    """
    options = {"seed": settings.seed, "num_resamples": settings.num_resamples}
    weights = [group.num_tokens for group in groups]
    return TextResult(
        task=task,
        num_examples=sum(map(len, weights)),
        num_tokens=round(sum(map(sum, weights))),
        num_context_tokens=sum(group.windows.num_context_tokens for group in groups),
        num_left_out=sum(group.windows.num_left_out for group in groups),
        num_window_tokens=max(group.windows.num_window_tokens for group in groups),
        min_prompt_tokens=min(group.windows.num_prompt_tokens for group in groups),
        max_prompt_tokens=max(group.windows.num_prompt_tokens for group in groups),
        dense_nll=sum(group.nll("dense_nll") for group in groups) / len(groups),
        plan_nll=sum(group.nll("plan_nll") for group in groups) / len(groups),
        nll_lost=upper_bound([group.nll_lost for group in groups], weights=weights, **options),
        kl=upper_bound([group.token_kl for group in groups], weights=weights, **options),
        decode_share=sum(group.decode_share for group in groups) / len(groups),
        **PromptBytes.total(group.sent for group in groups).fields(),
    )
