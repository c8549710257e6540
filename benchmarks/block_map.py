"""Claim: which blocks a model can miss is another question in prefill than in decode.

Every block is taken away alone, from one stage, and the KL to the dense model is measured on
several calibration sets, disjoint by prompt: WikiText, PIQA and instructions, from train splits.
Prefill without a block still writes its KV where decode reads it. `--data` is a directory of
published sets (`rayapp/data/published_sets.py` tells the layout). A set that is measured is kept in
`--work`, and not measured again.

    python benchmarks/block_map.py --model out/models/smollm2-135m --data DIR
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from recorder.options import add_dtype, add_model, add_seed, benchmark_parser, model_name
from recorder.origin import threads, type_words
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table

from rayapp.data.published_sets import write_files
from rayapp.errors import InputError
from rayapp.evaluation.paper.pictures import BlockMap
from rayapp.evaluation.progress import shown_progress
from rayapp.models.tokenizer import load_tokenizer
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.workflows.sensitivity import map_blocks


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_dtype(options, "auto", auto=True)
    add_seed(options, "the draw of calibration lines")
    options.add_argument("--data", type=Path, help="directory of published sets")
    options.add_argument("--sets", type=int, default=3, help="calibration sets")
    options.add_argument("--lines-per-task", type=int, default=32, help="of a calibration set")
    options.add_argument("--workers", type=int, default=0, help="evaluators; 0: this process")
    options.add_argument("--work", type=Path, default=Path("out") / "block_map")
    options.add_argument("--caption", default="", help="what the model is, for the caption")
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    if arguments.data is None:
        raise InputError("data=None: lines are drawn from published sets; give their --data")
    model, work = str(arguments.model), arguments.work / model_name(arguments.model)
    files = write_files(
        arguments.data,
        work / "data",
        num_sets=arguments.sets,
        lines_per_task=arguments.lines_per_task,
        seed=arguments.seed,
        tokenizer=load_tokenizer(model),
    )
    score = ScoreSettings(model=model, calibration=files.calibration[0], dtype=arguments.dtype)
    compute = ComputeSettings(
        workers=arguments.workers, threads=arguments.threads, device=arguments.device
    )
    with shown_progress() as progress:
        maps = []
        for one in map_blocks(score, compute, files.calibration, work / "maps", progress=progress):
            maps.append(one.model_dump(mode="json", exclude={"influence"}))
            recorder.write(maps=maps)


def report(record: Record) -> list[Block]:
    asked, maps = record["configuration"], record["maps"]
    singles = [one["singles"] for one in maps]
    title = "KL of every block taken away alone from prefill and from decode"
    picture = BlockMap(title, *([s[stage] for s in singles] for stage in ("prefill", "decode")))
    counts = sorted({one["num_lines"] for one in maps})
    lines = " to ".join(map(str, sorted({counts[0], counts[-1]})))
    caption = (
        f"{asked['caption'] or asked['model']}: KL to the dense model in nats per continuation "
        f"token, mean and range over calibration sets ({len(maps)}, of {lines} lines of WikiText, "
        f"PIQA and instructions, train splits), {type_words(asked['dtype'])}, "
        f"{threads(asked['threads'])}. A block that prefill misses still writes its KV."
    )
    rows = [
        (
            str(block),
            *(
                cell
                for stage in ("prefill", "decode")
                for cell in _cells([s[stage][block] for s in singles])
            ),
        )
        for block in range(len(singles[0]["prefill"]))
    ]
    columns = ("block", "prefill", "lowest to highest", "decode", "lowest to highest")
    return [picture, caption, Table(columns, rows)]


def _cells(values: list[float]) -> tuple[str, str]:
    mean = sum(values) / len(values)
    return f"{mean:.4g}", f"{min(values):.3g} to {max(values):.3g}"


if __name__ == "__main__":
    run(parser(), measure, report)
