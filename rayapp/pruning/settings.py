"""Everything that a search is told, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rayapp.errors import InputError
from rayapp.models.loading import DType
from rayapp.plan import KVTransfer, Stage, VisualTokens
from rayapp.pruning.candidates.healing import Heal
from rayapp.pruning.candidates.space import Space, Unit
from rayapp.pruning.evaluator.calibration import CHUNK_TOKENS
from rayapp.pruning.evaluator.evaluator import CACHE_BYTES
from rayapp.pruning.evaluator.objective import Objective, ObjectiveKind, ScoreBy
from rayapp.pruning.healing.training import Training

Method = Literal[
    "annealing",
    "cbo",
    "evolution",
    "exhaustive",
    "greedy",
    "one_shot",
    "random",
    "similarity",
    "surrogate",
    "window",
]

_NOT_IDENTITY = {
    "model", "calibration", "heal_data", "out", "workers", "address", "resume", "cache_bytes",
}  # fmt: skip
_HEALING = {"heal", "heal_steps", "heal_learning_rate"}
_ENVIRONMENT = {"device", "threads"}


_Settings = TypeVar("_Settings", bound=BaseModel)


def checked(kind: type[_Settings], values: Mapping[str, Any]) -> _Settings:
    """Settings of a kind; raises :class:`InputError` naming every bad value."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError("; ".join(_explain(each) for each in error.errors())) from None


def _explain(error: Any) -> str:
    if not error["loc"]:  # a rule of several values, which its message names
        return str(error["msg"]).removeprefix("Value error, ")
    return f"{'.'.join(map(str, error['loc']))}={error['input']!r}: {error['msg']}"


class PruneSettings(BaseModel):
    """The settings of ``rayapp prune``.

    Attributes:
        model: Model directory; every evaluator reads it from this path.
        calibration: File of JSON lines.
        out: Directory, or any URI that pyarrow can write, for plan, journal and trials.
        prefill_remove: Blocks that prefill removes; parts count one half.
        decode_remove: Blocks that decode removes.
        target_speedup: Instead of sizes: how many times faster than dense a plan shall be, from
            prompt to last token at the calibration set's median lengths.
        pareto: Whether sizes are the most that is removed, and every size up to them is searched,
            for a front of plans instead of one.
        unit: Whether whole blocks are removed, or attention and MLP separately.
        kv_modes: Whether prefill may skip a block and still write its KV; without, prefill removes
            only what decode removes (PDTrim's rule).
        shared: Whether both stages remove one and the same set.
        pruning_set: Whether only blocks of PDTrim's pruning set may be removed.
        distillation_threshold: Similarity from which on a block belongs to the pruning set; the
            paper's default.
        heal: Which removed blocks hand their work to a trained survivor: ``none``, those of the
            distillation set (``pair``), or ``all``; where a survivor is free
            (:mod:`rayapp.pruning.candidates.healing`).
        heal_data: File of JSON lines to train survivors on; none of its prompts may be in the
            calibration file.
        heal_steps: Training steps of a pair.
        heal_learning_rate: At their first step; None follows the model's width.
        method: Search method.
        score_by: Whether tasks or tokens weigh equally.
        objective: KL to the dense model, or negative log-likelihood.
        kl_top_k: KL over the dense model's likeliest tokens only, all others as one outcome; 0 is
            exact.
        racing: Whether candidates of a generation race on growing sets of chunks, and only the
            best are scored on all.
        first_token: Stage that makes the first answer token.
        kv_transfer: Transfer rules by block, scored together with the removals.
        visual_tokens: How visual tokens are pruned while blocks are searched, and by the plan: a
            rule, or as text its JSON or only how many are kept.
        evaluations: Candidates scored at most; None leaves it to the method.
        generation_size: Candidates asked at a time, whatever the number of workers (project
            default).
        seed: Seed of the search.
        workers: Ray evaluators; 0 scores in this process, without Ray.
        address: Ray cluster to use; None uses the running one, or starts one here.
        resume: Go on from the journal in ``out``.
        dtype: Element type that the model is loaded in.
        device: Device of each evaluator.
        threads: Torch threads of each evaluator.
        chunk_tokens: Tokens that an evaluator runs at a time, padding included.
        cache_bytes: Bound of each evaluator's cache.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    calibration: str
    out: str
    prefill_remove: float = Field(default=0.0, ge=0)
    decode_remove: float = Field(default=0.0, ge=0)
    target_speedup: float | None = Field(default=None, gt=1)
    pareto: bool = False
    unit: Unit = "block"
    kv_modes: bool = True
    shared: bool = False
    pruning_set: bool = False
    distillation_threshold: float = Field(default=0.95, ge=-1, le=1)
    heal: Heal = "none"
    heal_data: str | None = None
    heal_steps: int = Field(default=Training.steps, ge=1)
    heal_learning_rate: float | None = Field(default=None, gt=0)
    method: Method = "surrogate"
    score_by: ScoreBy = "task"
    objective: ObjectiveKind = "kl"
    kl_top_k: int = Field(default=0, ge=0)
    racing: bool = False
    first_token: Stage = "prefill"
    kv_transfer: dict[int, KVTransfer] = Field(default_factory=dict)
    visual_tokens: VisualTokens | None = None
    evaluations: int | None = Field(default=None, ge=1)
    generation_size: int = Field(default=8, ge=1)
    seed: int = 0
    workers: int = Field(default=0, ge=0)
    address: str | None = None
    resume: bool = False
    dtype: DType = "auto"
    device: str = "cpu"
    threads: int = Field(default=1, ge=1)
    chunk_tokens: int = Field(default=CHUNK_TOKENS, ge=1)
    cache_bytes: int = Field(default=CACHE_BYTES, ge=0)

    @field_validator("visual_tokens", mode="before")
    @classmethod
    def _written(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            found = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError('give a count, a share, or JSON such as {"num_keep": 64}') from None
        return found if isinstance(found, dict) else {"num_keep": found}

    @classmethod
    def checked(cls, **values: Any) -> PruneSettings:
        """Settings from a command line; raises :class:`InputError` naming every bad value."""
        return checked(cls, values)

    @property
    def identity(self) -> dict[str, Any]:
        """What a journal must agree on: everything that changes scores or choices, but paths."""
        unused = _HEALING if self.heal == "none" else set()
        unused = unused | ({"visual_tokens"} if self.visual_tokens is None else set())
        return self.model_dump(mode="json", exclude=_NOT_IDENTITY | _ENVIRONMENT | unused)

    @property
    def environment(self) -> dict[str, Any]:
        """What is recorded, but may differ between a search and its resumption."""
        return self.model_dump(mode="json", include=_ENVIRONMENT)

    def scoring(self) -> Objective:
        """What candidates are compared by."""
        return Objective(
            kind=self.objective,
            score_by=self.score_by,
            first_token=self.first_token,
            kv_transfer=self.kv_transfer,
            kl_top_k=self.kl_top_k,
        )

    def training(self) -> Training:
        """How survivors are trained."""
        return Training(steps=self.heal_steps, learning_rate=self.heal_learning_rate)

    def check_healing(self) -> None:
        """Raise :class:`InputError` where healing contradicts another setting."""
        if (self.heal == "none") != (self.heal_data is None):
            raise InputError(
                f"heal={self.heal} with heal_data={self.heal_data}: healing needs a file of its "
                "own; give both --heal pair or all and --heal-data, or neither"
            )
        if self.heal != "none" and self.unit == "part":
            raise InputError(
                f"heal={self.heal} with unit=part: only whole blocks are healed; use --unit block, "
                "or --heal none"
            )
        if self.heal != "none" and self.pruning_set:
            raise InputError(
                f"heal={self.heal} with pruning_set: blocks of the pruning set need no healing, "
                "and no others would be removed; leave out --pruning-set, or use --heal none"
            )

    def fits(self, prefill_remove: float, decode_remove: float) -> bool:
        """Whether the coupling of the stages allows these sizes."""
        if self.shared:
            return prefill_remove == decode_remove
        return self.kv_modes or prefill_remove <= decode_remove

    def sizes(self) -> list[tuple[float, float]]:
        """All sizes up to those given that the coupling allows, but for none at all; ascending."""
        step = 0.5 if self.unit == "part" else 1.0
        prefill, decode = (
            [step * n for n in range(1 + int(most / step))]
            for most in (self.prefill_remove, self.decode_remove)
        )
        pairs = [(p, d) for p in prefill for d in decode if (p or d) and self.fits(p, d)]
        if not pairs:
            raise InputError(
                f"prefill_remove={self.prefill_remove:g} and decode_remove={self.decode_remove:g} "
                "leave no sizes to search; raise them"
            )
        return pairs

    def check(self, num_blocks: int) -> None:
        """Raise :class:`InputError` where settings contradict a rule, or each other."""
        self.check_healing()
        if self.pareto and self.target_speedup is not None:
            raise InputError(
                f"target_speedup={self.target_speedup:g} asks for one plan and pareto for a front; "
                "leave out one or the other"
            )
        if self.pareto:
            for prefill, decode in self.sizes():
                self.model_copy(update={"prefill_remove": prefill, "decode_remove": decode}).space(
                    num_blocks
                )
        elif self.target_speedup is None:
            self.space(num_blocks)
        elif self.prefill_remove or self.decode_remove:
            raise InputError(
                f"target_speedup={self.target_speedup:g} chooses the sizes, but prefill_remove="
                f"{self.prefill_remove:g} and decode_remove={self.decode_remove:g} are given; "
                "leave out one or the other"
            )

    def space(self, num_blocks: int) -> Space:
        """The candidates; raises :class:`InputError` where sizes contradict a rule."""
        if not self.prefill_remove and not self.decode_remove:
            raise InputError(
                "prefill_remove=0 and decode_remove=0 leave nothing to search; give "
                "--prefill-remove, --decode-remove or --target-speedup"
            )
        return Space(
            num_blocks,
            self.prefill_remove,
            self.decode_remove,
            self.unit,
            self.kv_modes,
            self.shared,
        )
