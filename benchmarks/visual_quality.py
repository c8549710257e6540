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
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from visual.tables import draw, markdown

from rayapp.errors import DataError, InputError
from rayapp.evaluation.data import EvaluationData, read_data
from rayapp.evaluation.machine import this_machine
from rayapp.evaluation.progress import shown_progress
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.token_pictures import views
from rayapp.evaluation.visual_prompts import VisualPrompts
from rayapp.evaluation.visual_quality import Matches, visual_matches
from rayapp.evaluation.visual_result import (
    VISUAL_FILE,
    Groups,
    StageGain,
    VisualQuality,
    VisualRow,
    VisualSample,
    exact_match,
)
from rayapp.models.blocks import text_config
from rayapp.models.loading import LoadedModel, load_model
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan, VisualTokens
from rayapp.pruning.image_lines import TokenizedImageLine
from rayapp.testbed import vision_model_path
from rayapp.testbed.vision.files import write_questions
from rayapp.testbed.vision.score import draw_asked_scenes
from rayapp.vision.images import decode_file
from rayapp.vision.inputs import ImageIntake
from rayapp.vision.llava import load_image_processor
from rayapp.vision.selection import METHODS

SPLIT, SEED = "test", 1
BOTH, STAGES = "trimtokenator", ("alignment", "diversity")


@dataclass(frozen=True)
class Judged:
    """Which questions are answered rightly by the dense model, and under every rule."""

    lines: list[TokenizedImageLine]
    groups: Groups
    dense: Matches
    rules: dict[tuple[str, int, float | None], Matches]

    def row(self, rule: VisualTokens) -> VisualRow:
        return VisualRow.of(rule, self.rules[key(rule)], self.dense, self.groups)

    def gain(self, num_keep: int, alone: str) -> StageGain:
        both, one = (self.rules[name, num_keep, None] for name in (BOTH, alone))
        return StageGain.of(num_keep, alone, both, one, self.groups)


def key(rule: VisualTokens) -> tuple[str, int, float | None]:
    return rule.method, int(rule.num_keep), rule.num_aligned


class Bench:
    """A model, questions, and what they are answered with."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.loaded: LoadedModel = load_model(arguments.model, dtype=arguments.dtype)
        self.processor = load_image_processor(arguments.model)
        self.data = self._read()
        stack = BlockStack(self.loaded.model, PruningPlan(), "prefill")
        self.prompts = VisualPrompts(
            self.loaded.model,
            stack,
            self.processor,
            cls_attention="cls_attention" in arguments.methods,
        )

    def _read(self) -> EvaluationData:
        config = self.loaded.model.config
        found = read_data(
            self.arguments.data,
            self.loaded.tokenizer,
            max_positions=text_config(config).max_position_embeddings,
            settings=EvaluationSettings(limit=self.arguments.limit),
            images=ImageIntake.of(config),
        )
        if not found.image_lines:
            raise DataError("the data hold no question about an image; give lines with `image`")
        return found

    @property
    def rules(self) -> list[VisualTokens]:
        """Every method at every budget."""
        budgets = self.arguments.budgets
        return [VisualTokens(method=m, num_keep=k) for m in self.arguments.methods for k in budgets]

    @property
    def sweep(self) -> list[VisualTokens]:
        """TrimTokenator with other shares, where they leave enough to choose from."""
        fewest = min(counts(self.data.image_lines))
        return [
            VisualTokens(method=BOTH, num_keep=keep, num_aligned=share)
            for keep in self.arguments.sweep_budgets
            for share in self.arguments.shares
            if share * fewest >= keep
        ]

    def judge(self) -> Judged:
        lines, rules = self.data.image_lines, [*self.rules, *self.sweep]
        tasks = sorted({line.task for line in lines})
        groups = {t: [i for i, line in enumerate(lines) if line.task == t] for t in tasks}
        with shown_progress() as progress:
            dense, *found = visual_matches(
                self.prompts,
                [None, *rules],
                lines,
                end_token_ids=self.loaded.eos_token_ids,
                progress=progress,
            )
        return Judged(lines, groups, dense, dict(zip(map(key, rules), found, strict=True)))

    def samples(self, judged: Judged) -> list[VisualSample]:
        """A question of each of the first tasks: its first, its second, ..., of several images."""
        keep = self.arguments.sample_budget
        if keep not in self.arguments.budgets:
            raise InputError(
                f"--sample-budget {keep} is none of --budgets "
                f"{' '.join(map(str, self.arguments.budgets))}; choose one of these"
            )
        groups = [*judged.groups.values()][: self.arguments.samples]
        shown = [group[number % len(group)] for number, group in enumerate(groups)]
        return [self._sample(judged, index, keep) for index in shown]

    def _sample(self, judged: Judged, index: int, keep: int) -> VisualSample:
        line, methods = judged.lines[index], self.arguments.methods
        asked, decode = self.prompts.ask(line), self.loaded.tokenizer.decode
        kept = {m: asked.kept(VisualTokens(method=m, num_keep=keep)) for m in methods}
        shown = [
            view
            for number, (path, image) in enumerate(zip(line.images, asked.images, strict=True))
            for view in views(
                self.processor,
                decode_file(path).pixels,
                image.layout,
                {method: places[number] for method, places in kept.items()},
            )
        ]
        return VisualSample(
            task=line.task,
            question=decode(line.words),
            answer=decode(line.continuation[:-1]),
            num_keep=keep,
            is_match={method: bool(judged.rules[method, keep, None][index]) for method in methods},
            views=tuple(shown),
        )


def counts(lines: Sequence[TokenizedImageLine]) -> list[int]:
    """Visual tokens of each question's images before pruning."""
    return [len(line.prompt) - len(line.asked) + len(line.images) for line in lines]


def measure(arguments: argparse.Namespace) -> VisualQuality:
    started = time.perf_counter(), time.process_time()
    bench = Bench(arguments)
    judged = bench.judge()
    visual = counts(judged.lines)
    both = BOTH in arguments.methods
    alone = [stage for stage in STAGES if both and stage in arguments.methods]
    return VisualQuality(
        model=bench.loaded.signature,
        dtype=str(bench.loaded.model.dtype).removeprefix("torch."),
        data=bench.data.files,
        split=arguments.split,
        num_examples={task: len(group) for task, group in judged.groups.items()},
        num_visual_tokens=(min(visual), max(visual)),
        dense=exact_match(judged.dense, judged.groups),
        rows=tuple(judged.row(rule) for rule in bench.rules),
        stages=tuple(judged.gain(keep, stage) for keep in arguments.budgets for stage in alone),
        sweep=tuple(judged.row(rule) for rule in bench.sweep),
        samples=tuple(bench.samples(judged)),
        machine=this_machine(device="cpu", num_threads=arguments.threads),
        wall_s=time.perf_counter() - started[0],
        cpu_s=time.process_time() - started[1],
    )


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
    parser.add_argument("--sample-budget", type=int, default=64, help="tokens kept in pictures")
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
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        complete(arguments, Path(folder))
        found = measure(arguments)
    stem = f"visual_quality-{arguments.name or arguments.model.name}"
    found.save(arguments.out / f"{stem}.json")
    if arguments.beside:
        found.save(arguments.beside / VISUAL_FILE)
    text = markdown(found, arguments.name or arguments.model.name, f"{stem}.svg")
    (arguments.out / f"{stem}.md").write_text(text)
    draw(found, arguments.out / f"{stem}.svg")
    print(text)


if __name__ == "__main__":
    main()
