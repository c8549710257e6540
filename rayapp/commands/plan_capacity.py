"""``rayapp plan-capacity``: the replicas that a load needs, by simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rayapp.commands.options import command
from rayapp.errors import InputError
from rayapp.scaling.settings import Targets
from rayapp.simulation.settings import CapacitySettings, LoadSettings, MeasuringSettings
from rayapp.simulation.stage_costs import StageCosts


@command()
def plan_capacity(
    load: LoadSettings,
    targets: Targets,
    capacity: CapacitySettings,
    measuring: MeasuringSettings,
    costs: Annotated[
        list[Path] | None,
        typer.Option(help="File of stage costs; may be given several times, one per plan."),
    ] = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="Plan of the model to measure; may be given several times."),
    ] = None,
    save_costs: Annotated[
        Path | None,
        typer.Option(help="Directory that receives what was measured, a file per plan."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory that receives an SVG with the time line of every plan."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as JSON, and nothing else.")
    ] = False,
) -> None:
    """Say how many replicas meet targets under a load, and at which cost."""
    import json

    from rayapp.workflows.capacity_plan.result import (
        capacities,
        capacity_tables,
        conclusion,
        write_timelines,
    )
    from rayapp.workflows.terminal import show, table_console

    every = [StageCosts.load(path) for path in costs or []]
    if measuring.model is not None:
        every += _measured(measuring.model, plan or [], measuring, save_costs)
    elif plan:
        raise InputError("--plan without --model: there is nothing to measure; name the model")
    if not every:
        raise InputError("no costs: give --costs FILE, or --model DIR to measure them now")
    found = capacities(load, every, targets, capacity)
    written = write_timelines(found, out) if out else []
    if as_json:
        typer.echo(json.dumps([one.numbers() for one in found], indent=1))
        return
    show(table_console(), *(table.rich() for table in capacity_tables(found)))
    typer.echo(conclusion(found))
    for path in written:
        typer.echo(f"time line: {path}")


def _measured(
    model: str, plans: list[Path], measuring: MeasuringSettings, out: Path | None
) -> list[StageCosts]:
    """Costs of the dense model, or of every plan, which are kept if ``out`` says where."""
    from rayapp.plan import PruningPlan
    from rayapp.workflows.capacity_plan.measured import measured_costs

    name = Path(model).name
    chosen = {f"{name}, {path.name}": PruningPlan.load(path) for path in plans} or {
        f"{name}, dense": PruningPlan()
    }
    found = [measured_costs(model, one, measuring, label) for label, one in chosen.items()]
    for number, one in enumerate(found, start=1):
        if out is not None:
            one.save(out / f"costs-{number}.json")
    return found
