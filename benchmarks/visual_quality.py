"""Claim: which visual tokens are kept decides how few of them a model can answer from.

All methods of `rayapp.vision.selection` keep the same numbers of visual tokens per image on the
same questions, the dense model beside them. Exact match is teacher-forced, by question type; what
is lost is paired with the dense model's answers. Beside it: TrimTokenator's two stages together
against either alone, and how many tokens its first stage should let through.

Blocks are all run and all KV is kept: only visual tokens differ. Images are encoded once, prompts
of equal length run as one batch. In float32, the default, that equals the serving path (tested); in
bfloat16 batches of another shape may flip near ties.

The shipped model is asked about fresh scenes of the test split, one question of every type each;
other models need --data: JSON lines {"prompt", "completion", "image", "task"}, image paths relative
to the file. With --beside, the record also goes into a plan directory, where `rayapp report` shows
it.

    python benchmarks/visual_quality.py
    python benchmarks/visual_quality.py --model DIR --data questions.jsonl --split test
    python benchmarks/visual_quality.py --model DIR --data questions.jsonl --budgets 64 --limit 20
"""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

from recorder.options import add_dtype, add_model, add_seed, benchmark_parser
from recorder.run import Recorder, run
from visual.quality import report

from rayapp.evaluation.progress import shown_progress
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.visual.result import VisualQuality
from rayapp.evaluation.visual.study import StudySettings, compare
from rayapp.testbed import vision_model_path
from rayapp.testbed.vision.files import write_questions
from rayapp.testbed.vision.score import draw_asked_scenes
from rayapp.vision.selection import METHODS

SPLIT = "test"


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options, vision_model_path())
    add_dtype(options, "float32", auto=True)
    add_seed(options, "the scenes", default=1)
    options.add_argument("--data", type=Path, nargs="+", help="JSON lines; default: fresh scenes")
    options.add_argument("--scenes", type=int, default=250, help="scenes drawn without --data")
    options.add_argument("--split", default="", help="which split the data are, for the record")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options.add_argument("--budgets", type=int, nargs="+", default=[192, 128, 64, 32, 16, 8])
    options.add_argument("--sweep-budgets", type=int, nargs="*", default=[64, 16])
    options.add_argument(
        "--shares", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    )
    options.add_argument("--limit", type=int, help="questions per task")
    options.add_argument("--samples", type=int, default=3, help="questions that are pictured")
    options.add_argument("--sample-budget", type=int, help="tokens kept in pictures; default: 64")
    options.add_argument("--beside", type=Path, help="a plan directory that gets a copy")
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    with tempfile.TemporaryDirectory() as folder:
        if arguments.data is None:
            arguments.data, arguments.split = [Path(folder) / f"{SPLIT}.jsonl"], SPLIT
            scenes = draw_asked_scenes(SPLIT, arguments.scenes, arguments.seed)
            write_questions(arguments.data[0], scenes)
        comparison = compared(arguments)
    if arguments.beside:
        comparison.save_beside(arguments.beside)
    recorder.write(comparison=comparison.model_dump(mode="json"))


def compared(arguments: Namespace) -> VisualQuality:
    with shown_progress() as progress:
        return compare(
            arguments.model,
            arguments.data,
            StudySettings(
                budgets=arguments.budgets,
                methods=arguments.methods,
                sweep_budgets=arguments.sweep_budgets,
                shares=arguments.shares,
                samples=arguments.samples,
                sample_budget=arguments.sample_budget,
            ),
            settings=EvaluationSettings(
                split=arguments.split, limit=arguments.limit, num_threads=arguments.threads
            ),
            dtype=arguments.dtype,
            progress=progress,
        )


if __name__ == "__main__":
    run(parser(), measure, report)
