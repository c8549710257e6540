"""``rayapp report`` draws all that is known of a plan on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rayapp.commands.options import command
from rayapp.errors import InputError
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.settings import DTYPE_HELP, REVISION_HELP, DType


@command()
def report(
    compute: ComputeSettings,
    plan: Annotated[Path, typer.Option("--plan", help="Plan directory or plan.json.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(help="JSON file of evaluate; evaluation.json beside the plan without it."),
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(help="JSON file of transfers; ledger.json beside the plan without it."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="HTML file to write; report.html beside the plan without it."),
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option("--sensitivity", help="First measure what each block costs alone."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Directory of the model, or its Hub id, for --sensitivity."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION_HELP)] = None,
    calibration: Annotated[
        str | None, typer.Option(help="File of JSON lines to score on, for --sensitivity.")
    ] = None,
    dtype: Annotated[DType, typer.Option(help=DTYPE_HELP)] = "auto",
) -> None:
    """Draw all that is known of a plan on one HTML page."""
    from rayapp.evaluation.report.findings import gather
    from rayapp.evaluation.report.page import REPORT_FILE, write_report

    if sensitivity != bool(model and calibration) or bool(model) != bool(calibration):
        raise InputError(
            "--sensitivity runs a model on lines, and nothing else does: give it with --model and "
            "--calibration, or none of the three"
        )
    if sensitivity:
        _measure(
            compute, plan, model=model, revision=revision, calibration=calibration, dtype=dtype
        )
    home = plan if plan.is_dir() else plan.parent
    findings = gather(plan, evaluation=evaluation, ledger=ledger)
    typer.echo(write_report(out or home / REPORT_FILE, findings))
    for what in findings.left_out:
        typer.echo(f"left out: {what}", err=True)


def _measure(compute: ComputeSettings, plan: Path, **scored: object) -> None:
    """Measure the cost of every block alone; the page reads it from the file beside the plan."""
    from rayapp.evaluation.progress import shown_progress
    from rayapp.pruning.settings.score import ScoreSettings
    from rayapp.workflows.sensitivity import measure

    with shown_progress() as progress:
        measure(ScoreSettings.checked(**scored), compute, plan, progress=progress)
