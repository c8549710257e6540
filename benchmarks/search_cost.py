"""Claim: a search costs a fraction of what scoring its candidates one by one would cost.

Four parts, each with a claim of its own (`--only` runs some of them and leaves the results of the
others as they are):

- `search`: searches over both stages; then every candidate that was scored on all lines is scored
  again from scratch, in the same batches and against the same dense reference, but nothing shared
  between candidates. Compared are block x token forwards, wall and CPU seconds; everything that the
  search did is on its side (the dense model, the influence, races). The same searches with racing,
  and what their plans are worth on fresh lines.
- `decode_only`: decode-only candidates against the bound (P + C) / C x L / (L - f) that the lengths
  and the first changed block f allow.
- `workers`: one and two Ray evaluators on the same work, alternated.
- `simulation`: up to 256 evaluators, from the recorded trace of a search.

    python benchmarks/search_cost.py                                   # the shipped test-bed model
    python benchmarks/search_cost.py --only decode_only simulation
    python benchmarks/search_cost.py --lines 16 --evaluations 32 --seeds 1 --repeats 1   # a look
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from cost.decode_only import decode_only
from cost.held_out import held_out
from cost.lines import equal_lines
from cost.table import markdown
from cost.trial import trial
from cost.workers import simulation, two_workers

from rayapp.evaluation.machine import this_machine
from rayapp.models.loading import LoadedModel, load_model
from rayapp.pruning.settings.search import SearchSettings
from rayapp.testbed import text_model_path

FRESH_SEED = 2_000_003


def search_part(arguments: argparse.Namespace, model: LoadedModel) -> dict[str, Any]:
    rows, pairs = [], []
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        row, pair = trial(arguments, model, seed)
        rows.append(row)
        pairs.append(pair)
        ratios = (row["naive/search"]["forwards"], row["naive/racing"]["forwards"])
        print(f"seed {seed}: {ratios[0]:.1f}x, with racing {ratios[1]:.1f}x", flush=True)
    fresh = equal_lines(model.tokenizer, arguments, "validation", arguments.held_out, FRESH_SEED)
    lines = equal_lines(model.tokenizer, arguments, "calibration", arguments.lines, arguments.seed)
    return {
        "num_lines": len(lines.lines),
        "num_chunks": len(lines.chunks),
        "seeds": rows,
        "held_out": held_out(model.model, fresh, pairs),
    }


PARTS = {
    "search": search_part,
    "decode_only": decode_only,
    "workers": two_workers,
    "simulation": simulation,
}


def measure(name: str, arguments: argparse.Namespace, model: LoadedModel) -> dict[str, Any]:
    """One part, with everything that says what it was measured on."""
    load = os.getloadavg()[0]
    result = PARTS[name](arguments, model)
    kept = {key: value for key, value in vars(arguments).items() if key not in ("out", "only")}
    return {
        "arguments": {**kept, "model": arguments.model.name},
        "machine": this_machine(device="cpu", num_threads=arguments.threads).model_dump(),
        "load_average": [load, os.getloadavg()[0]],
        "result": result,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default_method = SearchSettings.model_fields["method"].default
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--model", type=Path, default=text_model_path())
    parser.add_argument("--lines", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=4000, help="fresh lines, of all tasks")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--continuation-tokens", type=int, default=14)
    parser.add_argument("--chunk-tokens", type=int, default=8 * 142)
    parser.add_argument("--remove", type=int, default=2, help="blocks per stage")
    parser.add_argument("--method", default=default_method)
    parser.add_argument("--evaluations", type=int, help="default: the method's own")
    parser.add_argument("--seed", type=int, default=0, help="of the first search")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decode-repeats", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5, help="of 1 and 2 workers")
    parser.add_argument("--worker-candidates", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model, dtype="float32")
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"search_cost-{arguments.model.name}-{arguments.method}"
    kept = stem.with_suffix(".json")
    parts = json.loads(kept.read_text()).get("parts", {}) if kept.exists() else {}
    for name in arguments.only:
        parts[name] = measure(name, arguments, model)
        kept.write_text(json.dumps({"parts": parts}, indent=1) + "\n")
        stem.with_suffix(".md").write_text(markdown(parts))
    print(markdown(parts))


if __name__ == "__main__":
    main()
