"""Claim by claim: what each piece of the method is worth, on independently trained models.

Every study changes one piece at two of twelve blocks removed from each stage and measures, on the
same fresh examples (split `validation`), KL to the dense model and points of exact match lost
(teacher-forced); speed-up (128 tokens in, 64 out, batch 1, interleaved runs) and bytes (engine in
bf16, prompts of at least 128 tokens). A row that is done is kept, and skipped in a second run.

    python benchmarks/ablation.py --model rayapp/testbed/text --model out/testbed-seed1
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from ablations.bench import Bench, Sizes
from ablations.studies import STUDIES
from ablations.tables import markdown

from rayapp.evaluation.machine import this_machine
from rayapp.testbed import text_model_path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, action="append", help="default: the shipped model")
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--calibration-per-task", type=int, default=Sizes.calibration_per_task)
    parser.add_argument("--heal-per-task", type=int, default=Sizes.heal_per_task)
    parser.add_argument("--fresh-per-task", type=int, default=Sizes.fresh_per_task)
    parser.add_argument(
        "--runs", type=int, default=Sizes.runs, help="timed; 0: tables without speed"
    )
    parser.add_argument("--seeds", type=int, default=Sizes.seeds, help="of the study of methods")
    parser.add_argument("--work", type=Path, default=Path("out") / "ablation")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    sizes = Sizes(
        calibration_per_task=arguments.calibration_per_task,
        heal_per_task=arguments.heal_per_task,
        fresh_per_task=arguments.fresh_per_task,
        runs=arguments.runs,
        seeds=arguments.seeds,
    )
    models = [path.resolve() for path in arguments.model or [text_model_path()]]
    for path in models:
        run_model(path, arguments.work / name_of(path), sizes, arguments.studies)
    write(arguments, models)


def name_of(path: Path) -> str:
    """A model's name in tables: that of its directory, or of the shipped one."""
    return "testbed-text" if path.resolve() == text_model_path().resolve() else path.name


def run_model(path: Path, work: Path, sizes: Sizes, studies: list[str]) -> None:
    """Measure every row that is not there yet."""
    bench = Bench(path, work.absolute(), sizes)
    machine = this_machine(device="cpu", num_threads=1)
    for study in studies:
        for name, measure in STUDIES[study](bench):
            file = work / "rows" / study / f"{name.replace(' ', '_').replace('/', '-')}.json"
            if file.is_file():
                continue
            began_s = time.perf_counter()
            row = {"name": name} | measure() | {"commit": machine.commit}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(row | {"row_s": time.perf_counter() - began_s}, indent=2))
            print(f"{work.name} {study}: {name}, {time.perf_counter() - began_s:.0f} s", flush=True)


def write(arguments: argparse.Namespace, models: list[Path]) -> None:
    """All rows that are there, as JSON and as tables."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in models:
        rows = arguments.work / name_of(path) / "rows"
        found[name_of(path)] = {
            study: [read_row(f, timed=bool(arguments.runs)) for f in sorted_by_time(rows / study)]
            for study in STUDIES
            if (rows / study).is_dir()
        }
    machine = this_machine(device="cpu", num_threads=1)
    kept = ("calibration_per_task", "heal_per_task", "fresh_per_task", "runs", "seeds")
    configuration = {key: getattr(arguments, key) for key in kept}
    record = {
        "configuration": configuration,
        "machine": machine.model_dump(),
        "models": found,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "ablation.json").write_text(json.dumps(record, indent=2) + "\n")
    text = markdown(found, configuration, machine)
    (arguments.out / "ablation.md").write_text(text)
    print(text)


def read_row(file: Path, *, timed: bool) -> dict[str, Any]:
    """A measured row; without its times where they were taken on a busy machine."""
    row: dict[str, Any] = json.loads(file.read_text())
    times = ("search_s", "row_s")
    return {k: v for k, v in row.items() if timed or ("speedup" not in k and k not in times)}


def sorted_by_time(directory: Path) -> list[Path]:
    """Rows in the order in which they were measured."""
    return sorted(directory.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)


if __name__ == "__main__":
    main()
