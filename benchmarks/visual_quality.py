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

import argparse
import tempfile
from pathlib import Path

from visual.tables import draw, markdown

from rayapp.evaluation.progress import shown_progress
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.visual.study import StudySettings, compare
from rayapp.testbed import vision_model_path
from rayapp.testbed.vision.files import write_questions
from rayapp.testbed.vision.score import draw_asked_scenes
from rayapp.vision.selection import METHODS

SPLIT, SEED = "test", 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model directory; default: the shipped one")
    parser.add_argument("--data", type=Path, nargs="+", help="JSON lines; default: fresh scenes")
    parser.add_argument("--scenes", type=int, default=250, help="scenes drawn without --data")
    parser.add_argument("--split", default="", help="which split the data are, for the record")
    parser.add_argument("--name", help="of the result files; default: the model directory's")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--budgets", type=int, nargs="+", default=[192, 128, 64, 32, 16, 8])
    parser.add_argument("--sweep-budgets", type=int, nargs="*", default=[64, 16])
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    )
    parser.add_argument("--limit", type=int, help="questions per task")
    parser.add_argument("--samples", type=int, default=3, help="questions that are pictured")
    parser.add_argument("--sample-budget", type=int, help="tokens kept in pictures; default: 64")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--beside", type=Path, help="a plan directory that gets a copy")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def complete(arguments: argparse.Namespace, folder: Path) -> None:
    """Set what was left to the test-bed: its model, and questions of its own in ``folder``."""
    if arguments.model is None:
        arguments.model = vision_model_path()
        arguments.name = arguments.name or "testbed-vision"
    if arguments.data is None:
        arguments.data, arguments.split = [folder / f"{SPLIT}.jsonl"], SPLIT
        write_questions(arguments.data[0], draw_asked_scenes(SPLIT, arguments.scenes, SEED))


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder, shown_progress() as progress:
        complete(arguments, Path(folder))
        found = compare(
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
    name = arguments.name or arguments.model.name
    stem = f"visual_quality-{name}"
    found.save(arguments.out / f"{stem}.json")
    if arguments.beside:
        found.save_beside(arguments.beside)
    text = markdown(found, name, f"{stem}.svg")
    (arguments.out / f"{stem}.md").write_text(text)
    draw(found, arguments.out / f"{stem}.svg")
    print(text)


if __name__ == "__main__":
    main()
