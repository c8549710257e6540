"""A paper's tables for your checkpoint: ``ray job submit -- python jobs/reproduce.py ...``.

Data sets are given as ``--data PIQA=piqa.jsonl``, of lines ``{"prompt", "choices", "answer"}``,
``{"prompt", "completion"}`` or ``{"text"}``; calibration lines are ``{"prompt", "completion"}``.
Plans, outcomes per example and tables lie in ``--out``.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer

from rayapp.commands.reproduce import TABLES_DIRECTORY, Watch, reproduce
from rayapp.errors import InputError, RayappError
from rayapp.evaluation.paper.settings import ReproduceSettings
from rayapp.evaluation.progress import shown_progress
from rayapp.pruning.progress import ProgressReport


def _named(data: list[str]) -> dict[str, str]:
    """``NAME=FILE`` as a dictionary; raises :class:`InputError` for anything else."""
    found: dict[str, str] = {}
    for each in data:
        name, separator, path = each.partition("=")
        if not (separator and name and path):
            raise InputError(f"--data {each}: is not NAME=FILE, such as PIQA=piqa.jsonl")
        if name in found:
            raise InputError(f"--data {each}: {name} is given twice; use another name")
        found[name] = path
    return found


def main(
    model: Annotated[str, typer.Option(help="Model directory, readable from every node.")],
    calibration: Annotated[str, typer.Option(help="JSON lines that searches score on.")],
    data: Annotated[list[str], typer.Option(help="NAME=FILE; may be given several times.")],
    out: Annotated[str, typer.Option(help="Directory for plans, outcomes and tables.")],
    heal_data: Annotated[str | None, typer.Option(help="JSON lines to train survivors on.")] = None,
    heal: Annotated[str, typer.Option(help="none, pair or all")] = "pair",
    prefill_remove: Annotated[int | None, typer.Option(help="Blocks.")] = None,
    decode_remove: Annotated[int | None, typer.Option(help="Blocks.")] = None,
    share: Annotated[float | None, typer.Option(help="Of all blocks; 0.125.")] = None,
    methods: Annotated[str | None, typer.Option(help="Rows, such as greedy,kv_modes.")] = None,
    method: Annotated[str | None, typer.Option(help="Search method of our rows.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="Per search, at most.")] = None,
    target_reduction: Annotated[float | None, typer.Option(help="Such as 4.95.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples per task, or windows.")] = None,
    split: Annotated[str, typer.Option(help="Which split the data are, for the record.")] = "",
    window: Annotated[int | None, typer.Option(help="Tokens of a window of text.")] = None,
    runs: Annotated[int, typer.Option(help="Timed runs per batch size; 0: no timing.")] = 30,
    link_gbps: Annotated[float, typer.Option(help="Link that transfers are reckoned with.")] = 10.0,
    allow_overlap: Annotated[bool, typer.Option("--allow-overlap")] = False,
    workers: Annotated[int, typer.Option(help="Ray evaluators; 0 needs no Ray.")] = 0,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: this job's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
    seed: Annotated[int, typer.Option(help="Of searches, timings and resampling.")] = 0,
    threads: Annotated[int, typer.Option(help="Torch threads of every process.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Dense, the peers' methods and ours: quality, speed and bytes, each beside dense."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    values: dict[str, Any] = {
        "model": model, "calibration": calibration, "out": out, "heal_data": heal_data,
        "heal": heal, "prefill_remove": prefill_remove, "decode_remove": decode_remove,
        "share": share, "evaluations": evaluations, "target_reduction": target_reduction,
        "limit": limit, "split": split, "num_window_tokens": window, "num_runs": runs,
        "link_gbps": link_gbps, "allow_overlap": allow_overlap, "workers": workers,
        "address": address, "resume": resume, "seed": seed, "threads": threads, "dtype": dtype,
        "device": device,
    }  # fmt: skip
    values |= {"method": method} if method else {}
    try:
        rows = tuple(methods.split(",")) if methods else None
        settings = ReproduceSettings.checked(**values, data=_named(data), rows=rows)
        paper = reproduce(settings, Watch(search=ProgressReport, evaluation=shown_progress))
    except RayappError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from None
    typer.echo(paper.markdown())
    typer.echo(f"{out}/{TABLES_DIRECTORY}: paper.md, paper.csv, paper.json")


if __name__ == "__main__":
    typer.run(main)
