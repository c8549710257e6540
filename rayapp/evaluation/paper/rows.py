"""The rows of a paper: plans to compare, and how they come about.

A row's plan is searched, made by a rule, made from another row's plan, or given. All searches score
the same calibration lines by the same objective, so they differ in how they search, not in what
they search for. That is more than some of the papers give their methods.
:mod:`rayapp.evaluation.paper.presets` lists the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayapp.errors import InputError
from rayapp.evaluation.paper.settings import ReproduceSettings
from rayapp.plan import Encoding, ModelSignature, PruningPlan, Stage
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.search import SearchSettings


@dataclass(frozen=True)
class Row:
    """One row of the tables.

    Attributes:
        name: The name of the row's directory, and of the row on the command line.
        title: The row's title in tables.
        source: The paper, or ``ours``.
        search: The settings of its search that differ; None if it is not searched.
        healed: Whether the search heals.
        after: Names of rows; the last of them that exists gives this row's plan.
        family: The method that the row belongs to; several sizes of one method share it.
        beside: The name of our row under the same conditions, which the row is compared with.
        sizes: Blocks that prefill and decode remove; None takes those of the settings.
        first_token: The stage that makes the first answer token.
        first_token_weight: Number of tokens that the first one counts as in scores.
        made: A plan of a rule, which needs no search.
        fitted: Whether the plan is that of the row ``after``, healed in closed form.
        encoding: How the plan of the row ``after`` encodes all of its KV; None leaves it as it is.
        narrows: Whether the plan lacks channels of MLPs in place of blocks, as many parameters; it
            has neither speed nor parameter bytes of its own.
        mapped: Whether the plan is that of the blocks that cost least alone, by the map of blocks.
        plan: A plan's directory or file, for a row of a plan that exists already.
    """

    name: str
    title: str
    source: str
    search: Mapping[str, Any] | None = None
    healed: bool = False
    after: tuple[str, ...] = field(default=())
    family: str = ""
    beside: str = ""
    sizes: tuple[float, float] | None = None
    first_token: Stage = "prefill"
    first_token_weight: float = 1.0
    made: Callable[[ModelSignature], PruningPlan] | None = None
    fitted: bool = False
    encoding: Encoding | None = None
    narrows: bool = False
    mapped: bool = False
    plan: str = ""

    @property
    def method(self) -> str:
        """The method's name on the command line: the family, or the row's own name."""
        return self.family or self.name


DENSE = Row("dense", "dense", "")


def chosen_rows(settings: ReproduceSettings, rows: Sequence[Row]) -> tuple[Row, ...]:
    """Those rows that the settings name, dense first; a method's name stands for all of its rows.

    Raises:
        InputError: A name is not known.
    """
    given = tuple(Row(name, name, "", plan=path) for name, path in settings.plans.items())
    methods = list(dict.fromkeys(row.method for row in rows))
    wanted = methods if settings.rows is None else list(settings.rows)
    known = {name for row in rows for name in (row.name, row.method)}
    unknown = sorted(set(wanted) - known)
    if unknown:
        raise InputError(f"row {unknown[0]!r} is not known; use some of {', '.join(methods)}")
    chosen = [row for row in rows if row is DENSE or {row.name, row.method} & set(wanted)]
    taken = {row.name for row in chosen} & set(settings.plans)
    if taken:
        raise InputError(f"plan {min(taken)!r} has the name of a row; give it another one")
    return (*chosen, *given)


def row_sizes(row: Row, settings: ReproduceSettings, num_blocks: int) -> tuple[float, float]:
    """Numbers of blocks that prefill and decode of a row remove."""
    if row.sizes is not None:
        return row.sizes
    sizes = settings.sizes(num_blocks)
    shared = sum(sizes) // 2
    return (shared, shared) if row.search and row.search.get("shared") else sizes


def left_out(row: Row, settings: ReproduceSettings, sizes: tuple[float, float]) -> str | None:
    """The reason why a row cannot be made with these settings; None if it can."""
    if row.mapped and not settings.maps:
        return "--maps 0 was given"
    if row.healed and settings.heal_data is None:
        return "no --heal-data was given"
    if row.healed and settings.heal == "none":
        return "--heal none was given"
    if row.fitted and settings.heal != "linear":
        return "its plan is healed by linear maps alone, with --heal linear"
    if row.name == "kv_selected" and settings.target_reduction is None:
        return "no --target-reduction was given"
    subset = row.search is not None and not row.search.get("kv_modes", True)
    if subset and sizes[0] > sizes[1]:
        return f"prefill removes more blocks ({sizes[0]:g}) than decode ({sizes[1]:g})"
    return None


def score_settings(row: Row, settings: ReproduceSettings) -> ScoreSettings:
    """The settings of the score of a row's search."""
    own: dict[str, object] = {"first_token": row.first_token}
    if row.first_token_weight != 1:
        own["first_token_weight"] = row.first_token_weight
    return settings.score().model_copy(update=own)


def fit_settings(row: Row, settings: ReproduceSettings, out: Path) -> SearchSettings:
    """The settings by which a row's plan is healed without any search."""
    assert row.fitted, "other rows are searched"
    return SearchSettings.checked(
        out=str(out), heal=settings.heal, heal_data=settings.heal_data, seed=settings.seed
    )


def search_settings(
    row: Row, settings: ReproduceSettings, sizes: tuple[float, float], out: Path, *, resume: bool
) -> SearchSettings:
    """The settings of a row's search."""
    assert row.search is not None, "only searched rows ask"
    healing = {"heal": settings.heal, "heal_data": settings.heal_data} if row.healed else {}
    values = {
        "out": str(out),
        "prefill_remove": sizes[0],
        "decode_remove": sizes[1],
        "method": settings.method,
        "evaluations": settings.evaluations,
        "seed": settings.seed,
        "resume": resume,
    }
    return SearchSettings.checked(**{**values, **row.search, **healing})
