"""The page at ``/``: what is served, what the plan leaves out, who answers, what has travelled."""

from __future__ import annotations

from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from rayapp.api.service import HealthReport, ServiceDescription
from rayapp.plan import STAGES, Mode, PruningPlan

_UNITS = ("B", "KB", "MB", "GB", "TB")


def status_page(
    description: ServiceDescription, health: HealthReport, transfers: dict[str, Any] | None
) -> str:
    """The page as HTML without any reference to the outside.

    Args:
        description: What is served.
        health: Who answers now.
        transfers: The ledger; None where it could not be had.
    """
    source = resources.files("rayapp.api").joinpath("status.html.jinja").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["size"] = readable_bytes
    return environment.from_string(source).render(
        model=description,
        health=health,
        pools=health.pools(),
        plan=description.plan,
        stages=_stage_rows(description.plan),
        totals=(transfers or {}).get("totals") or {},
        links=(transfers or {}).get("links") or [],
    )


def readable_bytes(num_bytes: float) -> str:
    """``1536 -> 1.5 KB``, where a kilobyte is 1,000 bytes."""
    value, unit = float(num_bytes), 0
    while abs(value) >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} {_UNITS[0]}" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def _stage_rows(plan: PruningPlan) -> list[tuple[str, list[tuple[int, str]]]]:
    """Per stage the blocks with their modes; no blocks where the model is unknown."""
    num_blocks = plan.model.num_blocks if plan.model else 0
    return [
        (stage, [(block, str(Mode(plan.mode(stage, block)))) for block in range(num_blocks)])
        for stage in STAGES
    ]
