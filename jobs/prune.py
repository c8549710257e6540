"""A pruning search as a Ray job: ``ray job submit --working-dir . -- python jobs/prune.py ...``."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from rayapp.commands.prune import prune, prune_front
from rayapp.errors import InputError, RayappError
from rayapp.pruning.progress import ProgressReport
from rayapp.pruning.settings.checked import filled
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.search import SearchSettings


def main(
    model: Annotated[str, typer.Option(help="Model directory, readable from every node.")],
    calibration: Annotated[str, typer.Option(help="JSON lines with prompt and completion.")],
    out: Annotated[str, typer.Option(help="Directory or URI for plan, journal and trials.")],
    prefill_remove: Annotated[float, typer.Option(help="Blocks that prefill removes.")] = 0.0,
    decode_remove: Annotated[float, typer.Option(help="Blocks that decode removes.")] = 0.0,
    target_speedup: Annotated[float | None, typer.Option(help="Instead of sizes.")] = None,
    pareto: Annotated[bool, typer.Option(help="A front of plans up to these sizes.")] = False,
    unit: Annotated[str, typer.Option(help="block or part")] = "block",
    kv_modes: Annotated[bool, typer.Option(help="Skip blocks in prefill, write their KV.")] = True,
    shared: Annotated[bool, typer.Option(help="One set for both stages.")] = False,
    pruning_set: Annotated[bool, typer.Option(help="Only PDTrim's pruning set.")] = False,
    distillation_threshold: Annotated[float, typer.Option(help="Where it begins.")] = 0.95,
    heal: Annotated[str, typer.Option(help="none, pair or all")] = "none",
    heal_data: Annotated[str | None, typer.Option(help="JSON lines to train on.")] = None,
    heal_steps: Annotated[int, typer.Option(help="Training steps of a survivor.")] = 100,
    heal_learning_rate: Annotated[float | None, typer.Option(help="At the first step.")] = None,
    visual_tokens: Annotated[
        str | None, typer.Option(help="Kept per image: a count, a share, or JSON as in a plan.")
    ] = None,
    method: Annotated[str, typer.Option(help="As `rayapp prune --help` lists.")] = "surrogate",
    score_by: Annotated[str, typer.Option(help="task or token")] = "task",
    objective: Annotated[str, typer.Option(help="kl or nll")] = "kl",
    kl_top_k: Annotated[int, typer.Option(help="KL over so many tokens; 0: all.")] = 0,
    racing: Annotated[bool, typer.Option(help="Score all lines for the best only.")] = False,
    first_token: Annotated[str, typer.Option(help="prefill or decode")] = "prefill",
    evaluations: Annotated[int | None, typer.Option(help="Candidates scored at most.")] = None,
    workers: Annotated[int, typer.Option(help="Ray evaluators; 0 needs no Ray.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: this job's.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the journal in --out.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Search for what prefill and decode can each do without."""
    values = {key: value for key, value in locals().items() if key != "values"}
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        with ProgressReport() as report:
            settings = filled(values, ScoreSettings, ComputeSettings, SearchSettings)
            search = prune_front if pareto else prune
            result = search(*settings, on_progress=report)
    except RayappError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from None
    typer.echo(result.summary(out))


if __name__ == "__main__":
    typer.run(main)
