"""The page at ``/``: the model, its plan block by block, the replicas, and the KV transferred."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from rayapp.api.service import HealthReport, ServiceDescription
from rayapp.plan import STAGES, Mode, PruningPlan

_UNITS = ("B", "KB", "MB", "GB", "TB")


def status_page(
    description: ServiceDescription, health: HealthReport, transfers: dict[str, Any] | None
) -> str:
    """Return the page as HTML that loads nothing from elsewhere.

    Args:
        description: The served model, plan and limits.
        health: The replicas that answer now.
        transfers: The ledger; None if it could not be read.
    """
    return _template().render(
        model=description,
        health=health,
        pools=health.pools(),
        plan=description.plan,
        stages=_stage_rows(description.plan),
        totals=(transfers or {}).get("totals") or {},
        links=(transfers or {}).get("links") or [],
    )


@cache
def _template() -> Template:
    """The page's template, which is compiled once."""
    source = resources.files("rayapp.api").joinpath("status.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["size"] = readable_bytes
    return environment.from_string(source)


def readable_bytes(num_bytes: float) -> str:
    """Format a number of bytes for people: ``1536 -> 1.5 KB``, a kilobyte being 1,000 bytes."""
    value, unit = float(num_bytes), 0
    while abs(value) >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} {_UNITS[0]}" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def _stage_rows(plan: PruningPlan) -> list[tuple[str, list[tuple[int, str]]]]:
    """A row per stage with the mode of every block; without blocks if the model is unknown."""
    num_blocks = plan.model.num_blocks if plan.model else 0
    return [
        (stage, [(block, str(Mode(plan.mode(stage, block)))) for block in range(num_blocks)])
        for stage in STAGES
    ]
