"""Quality and bytes of ways to choose KV, side by side on the same prompts.

Prefill runs once per prompt for all ways. Dropped entries are masked in the full cache, and encoded
ones go through their encoding, so any choice per prompt and head can be judged; for a plan's rules
this equals the serving path (tested). Exact match is teacher-forced: every token of the answer, end
marker included, is the likeliest after the right ones before it, which is what greedy decoding
needs to write that answer.
Shapes: B = prompts of equal length, H = KV heads, N = entries, C = continuation tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from kv.attention import PromptAttention, watched_hand_over
from kv.choosers import Choice, KVChooser
from rayapp.data.lines import TokenizedLine
from rayapp.evaluation.bootstrap import upper_bound
from rayapp.evaluation.measures.likelihood import HandedOver, TwoStages, equal_batches, padded
from rayapp.evaluation.progress import ProgressCallback, silent
from rayapp.kv.cache import Prefix, PrefixCache
from rayapp.kv.quantize import round_trip
from rayapp.models.likelihood import kl
from rayapp.plan import Encoding, PruningPlan
from rayapp.pruning.kv_choice.bytes import KVBytes

MIN_TOKENS = 3
"""Length that a mask by head needs; shorter continuations are padded up to it.

The attention kernel for a single query expects a mask of another shape.
"""


@dataclass
class KVQuality:
    """Bytes and quality of one way to choose, line by line.

    ``kl`` holds sums over a line's continuation tokens, in nats.
    """

    lines: Sequence[TokenizedLine]
    kl: dict[int, float] = field(default_factory=dict)
    is_match: dict[int, bool] = field(default_factory=dict)
    bytes_full: int = 0
    bytes_sent: int = 0

    @property
    def reduction(self) -> float:
        """Ratio of the bytes of all KV to the bytes sent."""
        return self.bytes_full / self.bytes_sent

    def groups(self) -> dict[str, list[int]]:
        """Line numbers by task."""
        tasks = sorted({line.task for line in self.lines})
        return {
            task: [i for i, line in enumerate(self.lines) if line.task == task] for task in tasks
        }

    def exact_match(self) -> dict[str, float]:
        """The share of lines that are answered exactly, by task."""
        return {
            task: sum(self.is_match[i] for i in group) / len(group)
            for task, group in self.groups().items()
        }

    def lost(self, other: KVQuality) -> tuple[float, float]:
        """Points of exact match lost against another way, mean over tasks, with its upper bound.

        The bound is of 95 %, one-sided, paired by line (bootstrap).
        """
        pairs = [
            [100.0 * (other.is_match[i] - self.is_match[i]) for i in group]
            for group in self.groups().values()
        ]
        bound = upper_bound(pairs, num_resamples=2_000)
        return bound.mean, bound.upper

    def mean_kl(self) -> tuple[float, float]:
        """Mean over tasks of the mean over tokens, and its 95 % upper bound (bootstrap)."""
        groups = list(self.groups().values())
        tokens = [[float(len(self.lines[i].continuation)) for i in group] for group in groups]
        means = [
            [self.kl[i] / n for i, n in zip(group, counts, strict=True)]
            for group, counts in zip(groups, tokens, strict=True)
        ]
        bound = upper_bound(means, weights=tokens, num_resamples=2_000)
        return bound.mean, bound.upper


def kv_quality(
    model: PreTrainedModel,
    plan: PruningPlan,
    choosers: Mapping[str, KVChooser],
    lines: Sequence[TokenizedLine],
    *,
    progress: ProgressCallback = silent,
) -> dict[str, KVQuality]:
    """Judge every way on every line; the dense model with all its KV is the reference.

    Args:
        model: The dense model.
        plan: The plan whose modes run; its transfer rules do not count.
        choosers: The ways to choose, by name.
        lines: Prompts with their answers.
        progress: Called batch by batch.
    """
    bare = plan.model_copy(update={"kv_transfer": {}})
    dense, stages = TwoStages(model, PruningPlan()), TwoStages(model, bare)
    num_bytes = KVBytes(model.config, bare, [len(line.prompt) for line in lines])
    qualities = {name: KVQuality(lines) for name in choosers}
    done = 0
    for batch in equal_batches(lines):
        prompts_BT, continuations_BC = padded(lines, batch)
        dense_BCV = dense.logits(prompts_BT, continuations_BC)
        handed, attention = watched_hand_over(stages, prompts_BT)
        for name, chooser in choosers.items():
            choice = chooser.choose(attention, num_bytes)
            logits_BCV = _logits(stages, handed, choice, continuations_BC)
            qualities[name].bytes_full += len(batch) * num_bytes.dense(prompts_BT.shape[1])
            qualities[name].bytes_sent += sum(choice.bytes_sent)
            for row, index in enumerate(batch):
                ids_C = torch.tensor(lines[index].continuation)
                mine_CV, its_CV = logits_BCV[row, : len(ids_C)], dense_BCV[row, : len(ids_C)]
                qualities[name].kl[index] = float(kl(its_CV, mine_CV).sum())
                qualities[name].is_match[index] = bool((mine_CV.argmax(-1).cpu() == ids_C).all())
        done += len(batch)
        progress("prompts", done, len(lines))
    return qualities


def _logits(
    stages: TwoStages, handed: HandedOver, choice: Choice, continuations_BC: torch.Tensor
) -> torch.Tensor:
    """Logits ``(B, C, V)`` after decode reads the entries that a choice sends."""
    num_tokens = continuations_BC.shape[1]
    if num_tokens < MIN_TOKENS:
        missing = MIN_TOKENS - num_tokens
        continuations_BC = torch.nn.functional.pad(continuations_BC, (0, missing))
    arrived = ChosenPrefix(handed.prefix, choice, stages.decode.num_query_heads)
    logits_BCV = stages.continued(replace(handed, prefix=arrived), continuations_BC)
    return logits_BCV[:, :num_tokens]


class ChosenPrefix(PrefixCache):
    """All KV of a batch, of which decode sees only the entries that a choice sent, as they arrive.

    Args:
        full: All KV as prefill leaves it.
        choice: The entries of it that travel.
        num_query_heads: Number of query heads, since masks are by query head.
    """

    def __init__(self, full: PrefixCache, choice: Choice, num_query_heads: int) -> None:
        arrived = {
            block: _arrived(prefix, choice.kept[block], choice.encodings[block])
            for block, prefix in full.prefixes.items()
        }
        super().__init__(arrived, full.windows)
        self._kept = {
            block: kept_BHN.repeat_interleave(num_query_heads // kept_BHN.shape[1], dim=1)
            for block, kept_BHN in choice.kept.items()
        }

    def masks(self, positions: torch.Tensor) -> dict[int, torch.Tensor]:
        """The masks of all KV, without the entries that did not travel, ``(B, query heads, C, N +
        C)``.
        """
        count = positions.shape[-1]
        return {
            block: mask
            & torch.nn.functional.pad(self._kept[block], (0, count), value=True)[:, :, None]
            for block, mask in super().masks(positions).items()
        }


def _arrived(full: Prefix, kept_BHN: torch.Tensor, encoding: Encoding) -> Prefix:
    """A block's KV after its round trip, head by head: groups of keys hold entries that travel."""
    if encoding == "model":
        return full
    keys, values = full.keys_BHND.clone(), full.values_BHND.clone()
    for row, head in itertools.product(range(keys.shape[0]), range(keys.shape[1])):
        index_N = kept_BHN[row, head % kept_BHN.shape[1]].nonzero()[:, 0].to(keys.device)
        sent = (each[row, head, index_N][None] for each in (full.keys_BHND, full.values_BHND))
        (keys[row, head, index_N],), (values[row, head, index_N],) = round_trip(*sent, encoding)
    return Prefix(keys, values, full.positions)


def attentions(
    model: PreTrainedModel, plan: PruningPlan, lines: Sequence[TokenizedLine]
) -> list[PromptAttention]:
    """The attention that rules per prompt are tuned on, batch by batch."""
    stages = TwoStages(model, plan.model_copy(update={"kv_transfer": {}}))
    return [watched_hand_over(stages, padded(lines, batch)[0])[1] for batch in equal_batches(lines)]


def tuned(
    make: Callable[[float], KVChooser],
    attention: Sequence[PromptAttention],
    num_bytes: KVBytes,
    max_bytes: float,
) -> KVChooser | None:
    """The chooser that sends most within ``max_bytes`` on some prompts; None if none does.

    Args:
        make: Makes a chooser from a number in 0..1; it sends no less for larger ones.
        attention: Attention of the prompts.
        num_bytes: Bytes of the plan on these prompts.
        max_bytes: Most bytes of all prompts together.
    """

    def sent(amount: float) -> int:
        chooser = make(amount)
        return sum(sum(chooser.choose(each, num_bytes).bytes_sent) for each in attention)

    low, high = 0.0, 1.0
    if sent(low) > max_bytes:
        return None
    if sent(high) <= max_bytes:
        return make(high)
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if sent(middle) <= max_bytes else (low, middle)
    return make(low)
