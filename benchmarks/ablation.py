"""Claim by claim: what each piece of the method is worth, on independently trained models.

Every study changes one piece at two of twelve blocks removed from each stage and measures, on the
same fresh examples (split `validation`), KL to the dense model and points of exact match lost
(teacher-forced); speed-up (128 tokens in, 64 out, batch 1, interleaved runs) and bytes (engine in
bf16, prompts of at least 128 tokens). A finished row is kept, and skipped in a second run.

    python benchmarks/ablation.py --model rayapp/testbed/text out/testbed-seed1
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ablations.bench import Bench, Sizes
from ablations.report import report
from ablations.studies import STUDIES
from recorder.options import add_model, benchmark_parser, model_name
from recorder.rows import Row, Rows
from recorder.run import Recorder, run

TOLD = ("kl", "worst_lost", "reduction", "speedup")
TIMES = ("search_s", "row_s")


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options, several=True)
    options.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    options.add_argument("--calibration-per-task", type=int, default=Sizes.calibration_per_task)
    options.add_argument("--heal-per-task", type=int, default=Sizes.heal_per_task)
    options.add_argument("--fresh-per-task", type=int, default=Sizes.fresh_per_task)
    options.add_argument(
        "--runs", type=int, default=Sizes.runs, help="timed; 0: tables without speed"
    )
    options.add_argument("--seeds", type=int, default=Sizes.seeds, help="of the study of methods")
    options.add_argument("--work", type=Path, default=Path("out") / "ablation")
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    sizes = Sizes(
        calibration_per_task=arguments.calibration_per_task,
        heal_per_task=arguments.heal_per_task,
        fresh_per_task=arguments.fresh_per_task,
        runs=arguments.runs,
        seeds=arguments.seeds,
    )
    models = {}
    for path in arguments.model:
        work = (arguments.work / model_name(path)).absolute()
        rows = Rows(work / "rows", recorder.commit, TOLD)
        measure_missing(Bench(path.absolute(), work, sizes), rows, arguments.studies)
        models[model_name(path)] = known_rows(rows, timed=bool(arguments.runs))
        recorder.write(models=models)


def measure_missing(bench: Bench, rows: Rows, studies: list[str]) -> None:
    """Measure every row that has no file yet."""
    for study in studies:
        for name, measured in STUDIES[study](bench):
            rows.kept(study, name, measured)


def known_rows(rows: Rows, *, timed: bool) -> dict[str, list[Row]]:
    """All rows of one model by study, those of earlier runs too."""
    by_study = {study: list(rows.all(study).values()) for study in STUDIES}
    return {s: [shown(row, timed=timed) for row in known] for s, known in by_study.items() if known}


def shown(row: Row, *, timed: bool) -> Row:
    """A measured row; it has no times if they were taken on a busy machine."""
    return {k: v for k, v in row.items() if timed or ("speedup" not in k and k not in TIMES)}


def label(_: Namespace) -> str:
    return ""


if __name__ == "__main__":
    run(parser(), measure, report, label=label)
