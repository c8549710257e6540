"""Claim: sets of KV rules chosen jointly keep more quality than other rules at the same bytes.

For each byte budget and smallest encoding, ways to choose the KV that travels are tuned on the same
calibration prompts, then judged on fresh ones of another split, all with the same block plan:

- elimination: `rayapp kv-select`, sets scored jointly;
- mass: PDTrim's rule, blocks that concentrate on first and last tokens are cut;
- sink + recent: one cut in all blocks;
- lazy blocks: SimLayerKV's rule per prompt, its cut the best of those given (on calibration);
- scored tokens: SnapKV's rule per prompt and KV head, the same share everywhere;
- all: every entry, in the model's type, int8 and int4, whatever that weighs.

Bytes are those of whole messages (headers, scales, and the indices of rules per prompt), in the
checkpoint's own element type. KL is to the dense model with all KV, mean over tasks of the mean
over answer tokens. Exact match is teacher-forced.

Prompts are the test-bed's questions, or with `--articles` real text: a fact that is told at uniform
depth of an article and asked for at its end, and articles that go on.

    python benchmarks/kv_rules.py
    python benchmarks/kv_rules.py --model MODEL --articles articles.jsonl --evaluations 120
    python benchmarks/kv_rules.py --fresh-per-task 4 --calibration-per-task 4 --reductions 3
"""

from __future__ import annotations

import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kv.attention import PromptAttention
from kv.choosers import (
    FixedRules,
    KVChooser,
    LazyBlocks,
    ScoredTokens,
    in_all_blocks,
)
from kv.quality import KVQuality, attentions, kv_quality, tuned
from lines.articles import ArticleLines, add_articles
from lines.drawn import drawn_lines
from recorder.options import add_dtype, add_model, add_seed, benchmark_parser, model_name
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table

from rayapp.errors import InputError
from rayapp.evaluation.progress import shown_progress
from rayapp.models.loading import LoadedModel, load_model
from rayapp.plan import Encoding, KVTransfer, PruningPlan
from rayapp.pruning.evaluator.calibration import Calibration
from rayapp.pruning.evaluator.evaluator import Evaluator
from rayapp.pruning.kv_choice.bytes import KVBytes
from rayapp.pruning.kv_choice.selection import select_kv
from rayapp.pruning.kv_choice.settings import FIRST, RECENT, KVMethod, KVSelectSettings
from rayapp.pruning.scorer import LocalCompute, Scorer
from rayapp.pruning.settings.objective import Objective
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.testbed import tasks

CALIBRATION_SEED, FRESH_SEED = 0, 1_000_003
WAYS = ("elimination", "mass", "sink + recent", "lazy blocks", "scored tokens")


@dataclass(frozen=True)
class Entry:
    """One way at one budget; it has no chooser if it cannot meet the budget."""

    way: str
    target: float | None
    encoding: Encoding
    chooser: KVChooser | None

    @property
    def name(self) -> str:
        target = "" if self.target is None else f" at {self.target:g}x"
        return f"{self.way}, {self.encoding}{target}"


class Bench:
    """A model, a plan, and the prompts that ways are tuned on."""

    def __init__(
        self, loaded: LoadedModel, plan: PruningPlan, lines: Calibration, arguments: Namespace
    ) -> None:
        self.loaded, self.lines = loaded, lines
        self.recent, self._evaluations = tuple(arguments.recent), arguments.evaluations
        self._home = tempfile.TemporaryDirectory()
        named = plan.model_copy(update={"model": loaded.signature, "kv_transfer": {}})
        self._plan_file = named.save(self._home.name)
        self.plan = PruningPlan.load(self._plan_file)
        self.bytes = KVBytes(loaded.model.config, self.plan, [len(x.prompt) for x in lines.lines])
        self.attention: list[PromptAttention] = attentions(loaded.model, self.plan, lines.lines)
        objective = Objective(first_token=plan.first_token)
        compute = LocalCompute(Evaluator(loaded.model, lines, objective))
        self._scorer = Scorer(lines, objective, compute, weights="dense")
        self.selections: dict[str, dict[str, Any]] = {}

    def selected(self, method: KVMethod, target: float, encoding: Encoding) -> KVChooser | None:
        """The choice of `rayapp kv-select`; scores are shared over budgets."""
        settings = KVSelectSettings(
            plan=self._home.name, target_reduction=target, encoding=encoding, method=method,
            last=self.recent, evaluations=None if method == "mass" else self._evaluations,
        )  # fmt: skip
        plan = PruningPlan.load(self._plan_file)
        score = ScoreSettings(model=str(self.loaded.path), calibration="drawn lines")
        try:
            selection = select_kv(score, settings, plan, self._scorer, self.loaded.model.config)
        except InputError as error:
            print(f"  {error}")
            return None
        self.selections[f"{method}, {encoding} at {target:g}x"] = selection.record()
        return FixedRules(selection.plan.kv_transfer)

    def tuned(self, make: Callable[[float], KVChooser], target: float) -> KVChooser | None:
        return tuned(make, self.attention, self.bytes, self.bytes.full / target)

    def best_lazy(self, target: float, encoding: Encoding) -> KVChooser | None:
        """Lazy blocks with the cut that is best on the calibration prompts."""
        choosers: dict[str, KVChooser] = {}
        for last in self.recent:
            cut = KVTransfer(first=FIRST, last=last, encoding=encoding)
            chooser = self.tuned(partial(LazyBlocks, cut=cut), target)
            if chooser is not None:
                choosers[str(last)] = chooser
        if len(choosers) < 2:
            return next(iter(choosers.values()), None)
        judged = kv_quality(self.loaded.model, self.plan, choosers, self.lines.lines)
        scores = {name: quality.mean_kl()[0] for name, quality in judged.items()}
        return choosers[min(scores, key=scores.__getitem__)]

    def entries(
        self, targets: Sequence[float], encodings: Sequence[Encoding], ways: Sequence[str]
    ) -> list[Entry]:
        blocks = range(self.loaded.signature.num_blocks)
        every: list[Encoding] = ["model", "int8", "int4"]
        entries = [
            Entry("all", None, each, in_all_blocks(KVTransfer(encoding=each), blocks))
            for each in every
        ]
        for encoding in encodings:
            for target in targets:
                started = time.perf_counter()
                made = {
                    "elimination": partial(self.selected, "elimination", target, encoding),
                    "mass": partial(self.selected, "mass", target, encoding),
                    "sink + recent": partial(
                        self.tuned, partial(sinks_and_recent, blocks, encoding), target
                    ),
                    "lazy blocks": partial(self.best_lazy, target, encoding),
                    "scored tokens": partial(
                        self.tuned, partial(ScoredTokens, encoding=encoding), target
                    ),
                }
                entries += [Entry(way, target, encoding, made[way]()) for way in ways]
                seconds = time.perf_counter() - started
                print(f"tuned for {target:g}x in {encoding}: {seconds:.0f} s", flush=True)
        return entries


def sinks_and_recent(blocks: range, encoding: Encoding, share: float) -> KVChooser:
    return in_all_blocks(KVTransfer(first=FIRST, last=share, encoding=encoding), blocks)


def row_of(entry: Entry, quality: KVQuality | None, uncut: KVQuality) -> dict[str, Any]:
    row: dict[str, Any] = {"way": entry.way, "target": entry.target, "encoding": entry.encoding}
    if quality is None:
        return row | {"reached": False}
    mean, upper = quality.mean_kl()
    match, (lost, lost_upper) = quality.exact_match(), quality.lost(uncut)
    return row | {
        "points_lost": lost,
        "points_lost_upper_95": lost_upper,
        "reached": True,
        "reduction": quality.reduction,
        "bytes_sent": quality.bytes_sent,
        "kl": mean,
        "kl_upper_95": upper,
        "exact_match": sum(match.values()) / len(match),
        "exact_match_by_task": match,
    }


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_dtype(options, "auto", auto=True)
    add_seed(options, "the prompts")
    options.add_argument("--plan", type=Path, help="plan directory; default: nothing removed")
    options.add_argument("--reductions", type=float, nargs="+", default=[2, 3, 4.95, 8])
    options.add_argument(
        "--encodings", nargs="+", choices=("model", "int8", "int4"), default=["model", "int8"]
    )
    options.add_argument("--recent", type=float, nargs="+", default=list(RECENT))
    options.add_argument("--calibration-per-task", type=int, default=32)
    options.add_argument("--fresh-per-task", type=int, default=500)
    options.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options.add_argument("--evaluations", type=int, help="most sets that an elimination scores")
    add_articles(options)
    options.add_argument("--tasks", nargs="+", choices=tasks.TASKS, default=list(tasks.TASKS))
    options.add_argument("--split", choices=tasks.SPLITS, default="validation")
    options.add_argument("--length", choices=("long", "mixed"), default="long")
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    loaded = load_model(arguments.model, dtype=arguments.dtype)
    plan = PruningPlan.load(arguments.plan) if arguments.plan else PruningPlan()
    plan.check_model(loaded.signature)
    draw = drawer(loaded, arguments)
    seeds = CALIBRATION_SEED + arguments.seed, FRESH_SEED + arguments.seed
    lines = draw("calibration", arguments.calibration_per_task, seeds[0])
    bench = Bench(loaded, plan, lines, arguments)
    entries = bench.entries(arguments.reductions, arguments.encodings, arguments.ways)
    fresh = draw(arguments.split, arguments.fresh_per_task, seeds[1]).lines
    choosers = {entry.name: entry.chooser for entry in entries if entry.chooser is not None}
    with shown_progress() as progress:
        judged = kv_quality(loaded.model, bench.plan, choosers, fresh, progress=progress)
    lengths = [len(line.prompt) for line in fresh]
    recorder.write(
        plan=bench.plan.model_dump(mode="json", exclude_none=True),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        prompt_tokens={"min": min(lengths), "max": max(lengths)},
        results=[
            row_of(entry, judged.get(entry.name), judged[entries[0].name]) for entry in entries
        ],
        tasks=sorted({line.task for line in fresh}),
        selections=bench.selections,
    )


def drawer(loaded: LoadedModel, arguments: Namespace) -> Callable[[str, int, int], Calibration]:
    """Draws lines of a split: of articles where they are given, or of the test-bed."""
    if arguments.articles:
        return ArticleLines.asked(loaded.tokenizer, arguments).drawn
    return partial(drawn_lines, loaded.tokenizer, length=arguments.length, names=arguments.tasks)


def report(record: Record) -> list[Block]:
    asked, lengths = record["configuration"], record["prompt_tokens"]
    name = asked["model"] + (f"-{asked['plan']}" if asked["plan"] else "")
    if asked.get("articles"):
        return [
            f"What travels of real text, chosen in different ways: {asked['caption'] or name}, "
            f"{record['dtype']}; tuned on {asked['calibration_per_task']} calibration lines per "
            f"task, judged on {asked['fresh_per_task']} lines per task of other articles "
            f"({', '.join(asked['articles'])}), {lengths['min']} to {lengths['max']} tokens. "
            "A `fact` is told at uniform depth and asked for at the end: exact match. `text` goes "
            f"on for {asked['answer_tokens']} tokens: the share of lines whose next tokens are all "
            "the likeliest is low for any model, so look at KL. Points are lost against all KV, "
            "mean of both tasks, with the 95 % upper bound (paired bootstrap). Prefill gives the "
            "first token of an answer, and decode all others. `encoding` is the smallest one "
            "allowed; rules other than elimination send everything in it.",
            table_of(record["results"], record["tasks"]),
        ]
    return [
        f"What travels, chosen in different ways: {name}, {record['dtype']}; tuned on "
        f"{asked['calibration_per_task']} calibration prompts per task, judged on "
        f"{asked['fresh_per_task']} fresh ones of the {asked['split']} split "
        f"({lengths['min']} to {lengths['max']} tokens, evidence at uniform depth). `encoding` is "
        "the smallest one allowed; rules other than elimination send everything in it.",
        table_of(record["results"], asked["tasks"]),
    ]


def table_of(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    cells = []
    for row in rows:
        target = "" if row["target"] is None else f"{row['target']:g}x"
        judged = ["out of reach", *["-"] * (2 + len(names) + any(map(points, rows)))]
        if row["reached"]:
            judged = [
                f"{row['reduction']:.2f}x",
                f"{row['kl']:.4f} ({row['kl_upper_95']:.4f})",
                f"{row['exact_match']:.1%}",
                *points(row),
                *(f"{row['exact_match_by_task'][name]:.1%}" for name in names),
            ]
        cells.append((row["encoding"], target, row["way"], *judged))
    columns = ("encoding", "target", "way", "reduction", "KL (at most, 95 %)", "exact match")
    lost = ("points lost (at most)",) if any(map(points, rows)) else ()
    return Table((*columns, *lost, *names), cells)


def points(row: dict[str, Any]) -> tuple[str, ...]:
    """Points lost with their bound; records from before it was measured have none."""
    if "points_lost" not in row:
        return ()
    return (f"{row['points_lost']:.1f} ({row['points_lost_upper_95']:.1f})",)


def label(arguments: Namespace) -> str:
    name = model_name(arguments.model)
    return f"{name}-{arguments.plan.name}" if arguments.plan else name


if __name__ == "__main__":
    run(parser(), measure, report, label=label)
