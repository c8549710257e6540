"""Choose which KV travels, as a Ray job: ``ray job submit -- python jobs/kv_select.py ...``."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer

from rayapp.commands.kv_select import kv_select
from rayapp.errors import InputError, RayappError
from rayapp.pruning.kv_choice.settings import KVSelectSettings
from rayapp.pruning.progress import ProgressReport
from rayapp.pruning.settings.checked import filled
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings


def main(
    model: Annotated[str, typer.Option(help="Model directory, readable from every node.")],
    plan: Annotated[str, typer.Option(help="Plan directory or plan.json.")],
    calibration: Annotated[str, typer.Option(help="JSON lines with prompt and completion.")],
    out: Annotated[str | None, typer.Option(help="Directory; none: that of the plan.")] = None,
    target_reduction: Annotated[float | None, typer.Option(help="Times fewer bytes.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Instead: largest KL to dense.")] = None,
    dtype: Annotated[str, typer.Option(help="model, int8 or int4: the smallest.")] = "model",
    method: Annotated[str, typer.Option(help="elimination or mass")] = "elimination",
    threshold: Annotated[float | None, typer.Option(help="For mass.")] = None,
    first: Annotated[str | None, typer.Option(help="Entries a cut keeps at the start.")] = None,
    last: Annotated[list[str] | None, typer.Option(help="And at the end.")] = None,
    workers: Annotated[int, typer.Option(help="Ray evaluators; 0 needs no Ray.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: this job's.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Choose which KV of a plan travels, and in which encoding."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        values: dict[str, Any] = {
            "model": model,
            "plan": plan,
            "calibration": calibration,
            "out": out,
            "target_reduction": target_reduction,
            "max_kl": max_kl,
            "encoding": dtype,
            "method": method,
            "threshold": threshold,
            "workers": workers,
            "seed": seed,
            "address": address,
            "device": device,
        }
        values |= {name: given for name, given in (("first", first), ("last", last)) if given}
        settings = filled(values, ScoreSettings, ComputeSettings, KVSelectSettings)
        with ProgressReport() as report:
            found = kv_select(*settings, on_progress=report)
    except RayappError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from None
    typer.echo(found.summary(out or plan))


if __name__ == "__main__":
    typer.run(main)
