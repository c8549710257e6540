"""Settings of a search: sizes, space, healing, method and budget."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from rayapp.errors import InputError
from rayapp.pruning.candidates.space import Space, Unit
from rayapp.pruning.settings.training import DEFAULT_TRAINING, Training
from rayapp.settings import Settings

Heal = Literal["none", "pair", "all", "linear", "pair+linear", "all+linear"]
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

_NOT_IDENTITY = {"heal_data", "out", "resume"}
_TRAINING = {"heal_steps", "heal_learning_rate"}

HealStates = Literal["dense", "served"]


class SearchSettings(Settings):
    """The settings of a search and of its output files."""

    model_config = ConfigDict(title="How it is searched")

    out: str = Field(
        description="Directory, or any URI that pyarrow can write, for plan, journal and trials."
    )
    prefill_remove: float = Field(
        default=0.0,
        ge=0,
        description="Number of blocks that prefill does without; an attention or an MLP alone "
        "counts one half.",
    )
    decode_remove: float = Field(
        default=0.0,
        ge=0,
        description="Number of blocks that decode does without; an attention or an MLP alone "
        "counts one half.",
    )
    target_speedup: float | None = Field(
        default=None,
        gt=1,
        description="Speed-up over the dense model, from prompt to last token, that sizes are "
        "chosen for; it is given instead of sizes.",
    )
    pareto: bool = Field(
        default=False,
        description="Front: search every size up to those given, for many plans instead of one.",
    )
    unit: Unit = Field(
        default="block",
        description="Unit of removal: a whole block, or a part of it (attention or MLP).",
    )
    kv_modes: bool = Field(
        default=True,
        description="KV modes: prefill may skip a block and still write its KV; without them, "
        "prefill removes only what decode removes.",
    )
    shared: bool = Field(
        default=False, description="Shared set: both stages remove one and the same blocks."
    )
    pruning_set: bool = Field(
        default=False,
        description="Pruning set: only blocks that hardly change their input may be removed, as "
        "in PDTrim.",
    )
    distillation_threshold: float = Field(
        default=0.95,
        ge=-1,
        le=1,
        description="Similarity of input and output from which on a block belongs to the pruning "
        "set; the default is PDTrim's.",
    )
    heal: Heal = Field(
        default="none",
        description="Healing of removed blocks: trained neighbours, for those outside the pruning "
        "set (pair) or all; linear maps in closed form (linear); both; or none.",
    )
    heal_states: HealStates = Field(
        default="dense",
        description="States that linear maps read: the dense model's, for all candidates alike, or "
        "those that the healed stage makes (served).",
    )
    heal_data: str | None = Field(
        default=None,
        description="File of JSON lines that survivors are trained on and maps are fitted to; "
        "none of its prompts may be in the calibration file.",
    )
    heal_steps: int = Field(
        default=DEFAULT_TRAINING.steps,
        ge=1,
        description="Number of training steps of each healed pair of blocks.",
    )
    heal_learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Learning rate of the first training step; without it, the model's width "
        "decides.",
    )
    method: Method = Field(default="surrogate", description="Method that the search follows.")
    racing: bool = Field(
        default=False,
        description="Race: score every candidate on few lines, and only the best on all of them.",
    )
    evaluations: int | None = Field(
        default=None,
        ge=1,
        description="Number of candidates that are scored at most; without it, the method decides.",
    )
    generation_size: int = Field(
        default=8,
        ge=1,
        description="Number of candidates that are scored at a time, however many evaluators "
        "share them.",
    )
    seed: int = Field(default=0, description="Seed of the search's random choices.")
    resume: bool = Field(
        default=False, description="Resumption: go on from the journal in the output directory."
    )

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that a journal must agree on: all that change choices, without paths."""
        unused = set() if self.trains_pairs else set(_TRAINING)
        unused |= {"heal"} if self.heal == "none" else set()
        unused |= {"heal_states"} if self.heal_states == "dense" else set()
        return self.model_dump(mode="json", exclude=_NOT_IDENTITY | unused)

    @property
    def trains_pairs(self) -> Literal["pair", "all"] | None:
        """Which removed blocks have survivors trained for them, if any have."""
        return "pair" if "pair" in self.heal else "all" if "all" in self.heal else None

    @property
    def heals_linearly(self) -> bool:
        """Whether removed spans are healed in closed form."""
        return "linear" in self.heal

    def training(self) -> Training:
        """The settings of the survivors' training."""
        return Training(steps=self.heal_steps, learning_rate=self.heal_learning_rate)

    def check_healing(self) -> None:
        """Raise :class:`InputError` if healing contradicts another setting."""
        if (self.heal == "none") != (self.heal_data is None):
            raise InputError(
                f"heal={self.heal} with heal_data={self.heal_data}: healing needs a file of its "
                "own; give both --heal and --heal-data, or neither"
            )
        if self.heal_states == "served" and self.heal != "linear":
            raise InputError(
                f"heal_states=served with heal={self.heal}: only maps without survivors are fitted "
                "to the states of a healed stage; use --heal linear, or --heal-states dense"
            )
        if self.heal != "none" and self.unit == "part":
            raise InputError(
                f"heal={self.heal} with unit=part: only whole blocks are healed; use --unit block, "
                "or --heal none"
            )
        if self.trains_pairs and self.pruning_set:
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
        """All sizes up to the given ones that the coupling allows, except (0, 0); ascending."""
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
        """Raise :class:`InputError` if settings contradict a rule, or each other."""
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
        """The space of candidates; raises :class:`InputError` if sizes contradict a rule."""
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
