"""The result of one evaluation: dense beside plan per task, timings, bytes, provenance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from rayapp.errors import DataError
from rayapp.evaluation.bootstrap import Bound
from rayapp.evaluation.machine import Machine
from rayapp.evaluation.quality import Quality, RolloutResult
from rayapp.evaluation.settings import Clock, EvaluationSettings
from rayapp.plan import ModelSignature, Stage
from rayapp.settings import Strict

MEAN = "mean"
Side = Literal["dense", "plan"]
SIDES: tuple[Side, ...] = ("dense", "plan")
CLAIM_EXAMPLES = 2_000
CLAIM_PROMPT_TOKENS = 128
CLAIM_RUNS = 30


class MeasuredRow(Strict):
    """A task, or the mean over tasks (``mean``): its examples, and the sums of their KV's bytes.

    Prompt tokens are those of the unpruned prompt, with all tokens of its images.
    ``decode_share`` is the share of the scored tokens that decode computed; the others are first
    tokens, of prefill. ``seen`` says how the plan was chosen or trained on this task; empty if not.
    """

    task: str
    num_examples: int = Field(ge=1)
    min_prompt_tokens: int = Field(ge=1)
    max_prompt_tokens: int
    bytes_full: int
    bytes_sent: int
    overhead_bytes: int
    saved_by_visual_tokens_bytes: int = 0
    decode_share: float | None = Field(default=None, ge=0, le=1)
    seen: str = ""

    @property
    def reduction(self) -> float:
        """Ratio of dense bytes to sent bytes: ``sum(bytes_full) / sum(bytes_sent)``.

        Header and padding count as sent.
        """
        return self.bytes_full / self.bytes_sent if self.bytes_sent else math.inf


class TaskResult(MeasuredRow):
    """One task, or the mean over tasks (``task`` = ``mean``; tasks count alike).

    NLL and KL are nats per continuation token, end marker included; ``exact_match`` is the share of
    completions that greedy decoding reproduces to the end marker. ``points_lost`` is in percentage
    points, dense minus plan. Bytes are sums over the plan's transfers of these examples.
    ``dense_answer`` and ``plan_answer`` leave the end marker aside: shares of completions that
    greedy decoding begins with (LAMBADA's last word).
    """

    num_tokens: int = Field(ge=1)
    mean_prompt_tokens: float
    dense_nll: float
    plan_nll: float
    kl: Bound
    dense_exact_match: float
    plan_exact_match: float
    points_lost: Bound
    dense_answer: float | None = None
    plan_answer: float | None = None


class ChoiceResult(MeasuredRow):
    """One multiple-choice task, or the mean over tasks (``task`` = ``mean``; tasks count alike).

    ``acc`` compares summed log-likelihoods, ``acc_norm`` their quotients per character
    (:mod:`rayapp.evaluation.measures.choices`). Losses are in percentage points, dense minus plan.
    """

    dense_acc: float
    plan_acc: float
    acc_lost: Bound
    dense_acc_norm: float
    plan_acc_norm: float
    acc_norm_lost: Bound


class TextResult(MeasuredRow):
    """Perplexity of one task's texts, or of the mean over tasks of their NLL.

    ``num_examples`` counts windows (:mod:`rayapp.evaluation.measures.perplexity`). NLL and KL are
    nats per scored token; ``nll_lost`` is plan minus dense. ``num_context_tokens`` of the text are
    never scored, and ``num_left_out`` lie beyond the limit of windows.
    """

    num_tokens: int = Field(ge=1)
    num_context_tokens: int
    num_left_out: int
    num_window_tokens: int
    dense_nll: float
    plan_nll: float
    nll_lost: Bound
    kl: Bound

    @property
    def dense_perplexity(self) -> float:
        """Perplexity of the dense model: ``exp`` of its NLL."""
        return math.exp(self.dense_nll)

    @property
    def plan_perplexity(self) -> float:
        """Perplexity of the plan: ``exp`` of its NLL."""
        return math.exp(self.plan_nll)


class StageTimes(Strict):
    """Medians over runs: one prompt's prefill, one decode step, and a whole answer of N tokens.

    ``admit_ms`` is one prompt's KV put into decode's cache, and ``bytes_sent`` its message.
    """

    prefill_ms: float
    tpot_ms: float
    answer_ms: float
    admit_ms: float | None = None
    bytes_sent: int | None = None


class LatencyResult(Strict):
    """Interleaved timings without any transfer; speed-ups are dense over plan.

    ``speedup_at_least`` is the one-sided 95 % lower bound of ``speedup``. ``num_image_tokens`` of
    the prompt tokens belong to an image, before any pruning. ``clock`` is ``cpu`` where seconds are
    those that the process computed, whatever else the machine did.
    """

    num_prompt_tokens: int
    num_image_tokens: int = 0
    num_answer_tokens: int
    batch_size: int
    num_runs: int
    num_threads: int
    clock: Clock = "wall"
    dense: StageTimes
    plan: StageTimes
    speedup_at_least: float | None = None
    link_gbps: float | None = None
    first_token: Stage = "prefill"

    def handoff_ms(self, side: Side) -> float:
        """A prompt's way to decode: its bytes over the link, then into decode's cache."""
        times: StageTimes = getattr(self, side)
        sent_ms = 8e-6 * (times.bytes_sent or 0) / self.link_gbps if self.link_gbps else 0.0
        return sent_ms + (times.admit_ms or 0.0)

    def ttft_ms(self, side: Side) -> float:
        """Time to the first token; it waits for the handoff where decode samples it."""
        times: StageTimes = getattr(self, side)
        waits = side == "plan" and self.first_token == "decode"
        return times.prefill_ms + (self.handoff_ms(side) if waits else 0.0)

    def whole_ms(self, side: Side) -> float:
        """Time of a whole answer, its handoff included wherever it falls."""
        times: StageTimes = getattr(self, side)
        return times.answer_ms + self.handoff_ms(side)

    @property
    def speedup(self) -> float:
        """Speed-up of a whole answer: the median over runs of ``prefill + (N - 1) x TPOT``."""
        return self.dense.answer_ms / self.plan.answer_ms

    @property
    def ttft_speedup(self) -> float:
        """Speed-up of the median prefill, after which the first token leaves."""
        return self.dense.prefill_ms / self.plan.prefill_ms

    @property
    def tpot_speedup(self) -> float:
        """Speed-up of the median decode step."""
        return self.dense.tpot_ms / self.plan.tpot_ms


class PlanSummary(Strict):
    """The plan that was evaluated."""

    fingerprint: str
    is_empty: bool
    prefill_removed: float
    decode_removed: float


class DataFile(Strict):
    """One evaluation file; ``sha256`` is the hash of its bytes."""

    name: str
    sha256: str
    num_examples: int


class EvaluationResult(Strict):
    """Everything that ``rayapp evaluate`` measured; everything but ``latency`` is reproducible.

    ``complete`` is false in a file that was written while later tasks or timings were still open.
    Means leave out tasks that the plan has seen, unless it has seen them all. ``test_met_by`` names
    other plans (fingerprints) that met a file of this test split in the same directory.
    ``model_caption`` says what was done to the model's weights before we got them, and stands in
    the title of every table (:class:`rayapp.models.formats.origin.Origin`).
    """

    version: Literal[1] = 1
    complete: bool = False
    model: ModelSignature
    model_caption: str = ""
    dtype: str
    plan: PlanSummary
    settings: EvaluationSettings
    data: tuple[DataFile, ...]
    tasks: tuple[TaskResult, ...] = ()
    mean: TaskResult | None = None
    choices: tuple[ChoiceResult, ...] = ()
    choice_mean: ChoiceResult | None = None
    texts: tuple[TextResult, ...] = ()
    text_mean: TextResult | None = None
    rollouts: tuple[RolloutResult, ...] = ()
    quality: Quality | None = None
    test_met_by: tuple[str, ...] = ()
    latency: tuple[LatencyResult, ...] = ()
    machine: Machine

    def save(self, path: str | Path) -> Path:
        """Write JSON to ``path`` atomically, creating its directory; returns the file."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        temporary.replace(target)
        return target

    @classmethod
    def load(cls, path: str | Path) -> EvaluationResult:
        """Read the file that :meth:`save` wrote; raises :class:`DataError` if that fails."""
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error}); give an evaluation's JSON"
            ) from None
        return cls.parse(content, source=str(path))

    @classmethod
    def parse(cls, content: bytes, *, source: str) -> EvaluationResult:
        """Parse the bytes of a file called ``source``; raises :class:`DataError`."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first: Any = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "file"
            raise DataError(
                f"{source}: not an evaluation result ({where}: {first['msg']}); "
                "write one with `rayapp evaluate --out`"
            ) from None

    @property
    def caveats(self) -> tuple[str, ...]:
        """Reasons why these numbers must not be quoted as claims about the plan, if any."""
        reasons = [] if self.complete else ["the evaluation did not finish"]
        judged: tuple[MeasuredRow, ...] = (*self.tasks, *self.choices)
        fewest = min((task.num_examples for task in judged), default=0)
        if fewest < CLAIM_EXAMPLES and (judged or not self.texts):
            reasons.append(
                f"{fewest} examples in the smallest task; points lost need {CLAIM_EXAMPLES:,} each"
            )
        measured = (*judged, *self.texts)
        shortest = min((task.min_prompt_tokens for task in measured), default=0)
        if shortest < CLAIM_PROMPT_TOKENS:
            reasons.append(
                f"the shortest prompt has {shortest} tokens; "
                f"a byte reduction is quoted for at least {CLAIM_PROMPT_TOKENS}"
            )
        if self.dtype != "bfloat16":
            reasons.append(
                f"the engine ran in {self.dtype}; a byte reduction is quoted in bfloat16"
            )
        fewest_runs = min((timing.num_runs for timing in self.latency), default=CLAIM_RUNS)
        if fewest_runs < CLAIM_RUNS:
            reasons.append(f"{fewest_runs} timed runs; a speed-up is quoted from {CLAIM_RUNS}")
        if any(timing.clock == "cpu" for timing in self.latency):
            reasons.append("times are CPU seconds of one thread, which other load does not stretch")
        left_out = sum(task.num_left_out for task in self.texts)
        if left_out:
            reasons.append(f"{left_out:,} tokens of text lie beyond the limit of windows")
        if self.test_met_by:
            reasons.append(
                f"this test set was met before by {len(self.test_met_by)} other plans; choose on a "
                "validation set"
            )
        if not self.settings.split:
            reasons.append("the split of the data is not stated")
        return tuple(reasons)
