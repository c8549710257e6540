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
    python benchmarks/search_cost.py --lines 16 --evaluations 32 --seeds 1 --runs 1   # a look
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from cost.decode_only import decode_only
from cost.held_out import held_out
from cost.report import report
from cost.trial import trial
from cost.workers import simulation, two_workers
from lines.equal import equal_lines
from recorder.options import add_model, add_seed, benchmark_parser, model_name
from recorder.run import Recorder, run

from rayapp.models.loading import LoadedModel, load_model
from rayapp.pruning.settings.search import SearchSettings

FRESH_SEED = 2_000_003


def search_part(arguments: Namespace, model: LoadedModel) -> dict[str, Any]:
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


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_seed(options, "the first search; every further one adds 1")
    default_method = SearchSettings.model_fields["method"].default
    options.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options.add_argument("--lines", type=int, default=64)
    options.add_argument("--held-out", type=int, default=4000, help="fresh lines, of all tasks")
    options.add_argument("--prompt-tokens", type=int, default=128)
    options.add_argument("--continuation-tokens", type=int, default=14)
    options.add_argument("--chunk-tokens", type=int, default=8 * 142)
    options.add_argument("--remove", type=int, default=2, help="blocks per stage")
    options.add_argument("--method", default=default_method)
    options.add_argument("--evaluations", type=int, help="default: the method's own")
    options.add_argument("--seeds", type=int, default=10, help="searches")
    options.add_argument("--decode-runs", type=int, default=5, help="timed, of `decode_only`")
    options.add_argument("--runs", type=int, default=5, help="timed, of one and of two workers")
    options.add_argument("--worker-candidates", type=int, default=32)
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    model = load_model(arguments.model, dtype=arguments.dtype)
    for name in arguments.only:
        recorder.write_part(name, result=PARTS[name](arguments, model))


def label(arguments: Namespace) -> str:
    return f"{model_name(arguments.model)}-{arguments.method}"


if __name__ == "__main__":
    run(parser(), measure, report, label=label)
