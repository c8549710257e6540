"""Claim: prefill of a real model bears many more missing blocks than its decode does.

The rows of `rayapp reproduce --preset paper`: our searches, peers and rules over sizes of prefill,
of decode and of both, judged by the margin above chance that they keep and by perplexity, against
the measured time to the first token. `--data` is a directory of published sets, or sets of it as
NAME=DIR. `--count` prints the tokens and hours that are left, and measures nothing. Rows that are
done are kept in `--work`, and plans are written to `--plans`. `--beside` puts the rows of a record
that stands beside those of this run, if both have the same dense model, data and options.

    python benchmarks/real_model.py --model out/models/smollm2-135m --data DIR
"""

from __future__ import annotations

import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path

from recorder.options import (
    NamedPath,
    add_dtype,
    add_model,
    add_seed,
    benchmark_parser,
    configuration_of,
    model_name,
)
from recorder.origin import threads, type_words
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.standing import Standing
from recorder.table import Table

from rayapp.evaluation.paper.marks import quality_speed
from rayapp.evaluation.paper.numbers import (
    ANSWER,
    BY_DECODE,
    MARGIN,
    PERPLEXITY,
    TIMED_BYTES,
    TPOT,
    TTFT,
    Number,
    decode_shares,
)
from rayapp.evaluation.paper.outcome import ROW_FILE
from rayapp.evaluation.paper.presets import rows_of
from rayapp.evaluation.paper.settings import ReproduceSettings
from rayapp.evaluation.progress import shown_progress
from rayapp.models.checkpoint import Checkpoint
from rayapp.plan import PLAN_FILE, PruningPlan
from rayapp.pruning.progress import ProgressReport
from rayapp.workflows.paper.plans import ROWS_DIRECTORY
from rayapp.workflows.paper.reproduce import SUBJECT_FILE, Watch, count_work, reproduce

PLANS = Path(__file__).parent / "plans"


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_dtype(options, "auto", auto=True)
    add_seed(options, "draws, searches and resampling")
    options.add_argument(
        "--data", type=NamedPath.parse, nargs="+", default=[], help="published sets, or NAME=FILE"
    )
    options.add_argument("--methods", help="rows or methods, with commas; default: all")
    options.add_argument("--maps", type=int, default=3, help="calibration sets of the block map")
    options.add_argument("--calibration-per-task", type=int, default=32)
    options.add_argument("--evaluations", type=int, help="of every search at most")
    options.add_argument("--heal", default="linear", help="how healed rows are healed")
    options.add_argument("--limit", type=int, help="examples of a task; windows of a text")
    options.add_argument("--text-tokens", type=int, help="tokens of a text")
    options.add_argument("--window", type=int, default=2048, help="tokens of a window")
    options.add_argument("--runs", type=int, default=30, help="timed; 0: no speed")
    options.add_argument("--prompt-tokens", type=int, default=1020, help="timed")
    options.add_argument("--answer-tokens", type=int, default=129, help="timed")
    options.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="of timings")
    options.add_argument("--batch", type=int, nargs="+", default=[1], help="timed batch sizes")
    options.add_argument("--workers", type=int, default=0, help="evaluators; 0: this process")
    options.add_argument("--count", action="store_true", help="only count what is left")
    options.add_argument("--caption", default="", help="what the model is, for the caption")
    options.add_argument("--plans", type=Path, default=PLANS, help="directory of the plans")
    options.add_argument("--work", type=Path, default=Path("out") / "real_model")
    options.add_argument("--beside", type=Path, metavar="RECORD", help="rows that stay as they are")
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    out = arguments.work / model_name(arguments.model)
    settings = ReproduceSettings.checked(
        preset="paper",
        model=str(arguments.model),
        data=[str(each) for each in arguments.data],
        out=str(out),
        rows=arguments.methods,
        maps=arguments.maps,
        calibration_per_task=arguments.calibration_per_task,
        evaluations=arguments.evaluations,
        heal=arguments.heal,
        limit=arguments.limit,
        text_tokens=arguments.text_tokens,
        num_window_tokens=arguments.window,
        num_runs=arguments.runs,
        num_prompt_tokens=arguments.prompt_tokens,
        num_answer_tokens=arguments.answer_tokens,
        batch_sizes=tuple(arguments.batch),
        clock=arguments.clock,
        workers=arguments.workers,
        seed=arguments.seed,
        threads=arguments.threads,
        dtype=arguments.dtype,
        device=arguments.device,
        resume=(out / SUBJECT_FILE).is_file(),
        split="test and validation, as published",
    )
    watch = Watch(search=ProgressReport, evaluation=shown_progress)
    if arguments.count:
        print(count_work(settings, watch).table().markdown())
        return
    standing = _standing(arguments)
    there = {file.parent.name for file in (out / ROWS_DIRECTORY).glob(f"*/{ROW_FILE}")}
    paper = reproduce(settings, watch)
    arguments.plans.mkdir(parents=True, exist_ok=True)
    for row in paper.rows[1:]:
        kept = out / ROWS_DIRECTORY / row.name / PLAN_FILE
        # A healed plan cannot be used without its tensors, which are too large to keep here.
        if kept.is_file() and not PruningPlan.load(kept).healed:
            shutil.copyfile(kept, arguments.plans / f"{recorder.stem}-{row.name}.json")
    kept = [row.name for row in paper.rows if row.name in there]
    told = paper.record()
    written = {name: told[name] for name in ("rows", "left_out", "notes", "caveats")}
    if standing is not None:
        kept += _put_beside(written, standing, arguments.model)
    recorder.write(**written, kept=kept)


SAME = (
    "model", "dtype", "seed", "data", "calibration_per_task", "maps", "evaluations", "heal",
    "limit", "text_tokens", "window", "prompt_tokens", "answer_tokens", "clock",
)  # fmt: skip
"""The options that rows of one table share; without maps, no new row rests on them."""


def _standing(arguments: Namespace) -> Standing | None:
    """The record that rows are put beside; its options are compared before anything is measured."""
    if arguments.beside is None:
        return None
    same = SAME if arguments.maps else (name for name in SAME if name != "maps")
    return Standing(arguments.beside, "real_model", configuration_of(arguments), tuple(same))


def _put_beside(written: Record, standing: Standing, model: Path) -> list[str]:
    """Add the rows of a record that stands, in the order of the tables, and name them."""
    kept = standing.rows(written["rows"], ("acc", "acc_norm", "answer", PERPLEXITY, MARGIN))
    dense = written["rows"][0]
    if not any(number["metric"] == TTFT for number in dense["numbers"]):
        dense = standing.record["rows"][0]  # It answers as this run's does, and may be timed.
    order = [row.name for row in rows_of("paper", Checkpoint(str(model)).signature().num_blocks)]
    rows = [dense, *written["rows"][1:], *kept]
    # Plans that were added by name, or rows of another version, come last.
    places = {name: place for place, name in enumerate(order)}
    written["rows"] = sorted(rows, key=lambda row: places.get(row["name"], len(order)))
    for lines in ("notes", "caveats"):
        written[lines] = list(dict.fromkeys([*standing.record[lines], *written[lines]]))
    return [row["name"] for row in kept]


def report(record: Record) -> list[Block]:
    asked, rows = record["configuration"], record["rows"]
    picture = quality_speed(rows)
    model = asked["caption"] or asked["model"]
    # Rows that were timed by an earlier run keep their times, however this run was called.
    runs = sorted({n["num"] for row in rows for n in row["numbers"] if n["metric"] == TTFT})
    timed = (
        f"speed at {asked['prompt_tokens']:,} tokens in and {asked['answer_tokens']:,} out, batch "
        f"1, median of {' or '.join(map(str, runs))} interleaved runs, the first token after the "
        "handoff where decode makes it; "
    )
    legend = " A mark's label says how many blocks prefill (p) and decode (d) miss; up is better."
    caption = (
        f"{model}, {type_words(asked['dtype'])}, {threads(asked['threads'])}; "
        f"{timed if picture.marks else 'no speed was measured; '}"
        f"calibrated on {asked['calibration_per_task']} lines of every task."
        f"{legend if picture.marks else ''}"
    )
    drawn: list[Block] = [picture] if picture.marks else []
    notes = [f"- {note}" for note in record["notes"]]
    if runs:
        notes.append("- dense is timed beside itself: its ratios say how far times can be trusted")
    if record["kept"]:
        # A row does not know its commit; the recorder's last line must not speak for it.
        notes.append(
            f"- {len(record['kept'])} of {len(rows)} rows were measured by earlier runs, at "
            "commits and loads of their own; the line below is of the run that put them together"
        )
    notes += [f"- not for quotation: {caveat}" for caveat in record["caveats"]]
    return [*drawn, caption, _table(rows), "\n".join(notes)]


KINDS = {
    MARGIN: "{:.1f} %",
    PERPLEXITY: "{:.2f}",
    TTFT: "{:.3f}x",
    TPOT: "{:.3f}x",
    ANSWER: "{:.3f}x",
    TIMED_BYTES: "{:.2f}x",
}
"""The metrics of the table, and how their numbers look."""
RATIOS = {
    TTFT: "faster first token",
    TPOT: "faster answer token",
    ANSWER: "faster whole answer",
    TIMED_BYTES: "fewer KV bytes",
}
"""Heads of columns that no data set has a part in."""


def _table(rows: list[Record]) -> Table:
    """A row per plan, a column per number; numbers that no row has are left out."""
    shown: dict[tuple[str, str], int] = {}
    for number in (number for row in rows for number in row["numbers"]):
        if number["metric"] in KINDS:
            shown.setdefault((number["data"], number["metric"]), number["num"])
    heads = [
        RATIOS.get(metric, f"{data} {metric} (n={num:,})") for (data, metric), num in shown.items()
    ]
    cells = []
    for row in rows:
        known = {(n["data"], n["metric"]): n for n in row["numbers"]}
        removed = f"{row['prefill_removed']:g} and {row['decode_removed']:g}"
        told = [_cell(known.get(name), usual) for name, usual in shown.items()]
        decoded = decode_shares([Number(**number) for number in row["numbers"]])
        score = f"{row['search']['score']:.4f}" if row["search"] else "-"
        cells.append((row["title"], removed, score, decoded, *told))
    named = ("plan", "blocks missed, prefill and decode", "KL on calibration", f"{BY_DECODE}, %")
    return Table((*named, *heads), cells)


def _cell(number: Record | None, usual: int) -> str:
    """A margin with its lower bound, a perplexity, or a speed-up; other numbers of examples."""
    if number is None:
        return "-"
    form = KINDS[number["metric"]]
    if number["metric"] == MARGIN:
        fewer = "" if number["num"] == usual else f"; n={number['num']:,}"
        return f"{form.format(number['plan'])} (at least {100 - number['bound']:.1f}{fewer})"
    value = number["plan"] if number["metric"] == PERPLEXITY else number["difference"]
    return form.format(value)


if __name__ == "__main__":
    run(parser(), measure, report)
