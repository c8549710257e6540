"""Claim: keys that share scales per 64 kept entries lose no more than per prompt, for few bytes.

Prompts are prefilled once. Then their KV is encoded with keys in groups of every size asked for,
and one group for the whole prompt; decode goes on from each, teacher-forced. KL is to the same
decode with all KV as it is, mean over tasks of the mean over answer tokens, without an answer's
first token, which prefill makes. Bytes are codes and scales, against keys and values in the
model's own type.

    python benchmarks/key_groups.py
    python benchmarks/key_groups.py --model MODEL --articles articles.jsonl
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from kv.key_groups import encoded_bytes, in_groups
from lines.articles import ArticleLines, add_articles
from lines.drawn import drawn_lines
from recorder.options import add_dtype, add_model, add_seed, benchmark_parser
from recorder.page import Block
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table

from rayapp.data.lines import TokenizedLine
from rayapp.evaluation.bootstrap import upper_bound
from rayapp.evaluation.measures.likelihood import TwoStages, equal_batches, padded
from rayapp.kv.ledger import KVShape
from rayapp.models.likelihood import kl
from rayapp.models.loading import LoadedModel, load_model
from rayapp.plan import KEY_GROUP, Encoding, PruningPlan

ENCODINGS: tuple[Encoding, ...] = ("int8", "int4")
WHOLE = 0
"""Group size that stands for one group of the whole prompt."""

Way = tuple[Encoding, int]


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_dtype(options, "auto", auto=True)
    add_seed(options, "the prompts")
    add_articles(options)
    options.add_argument("--groups", type=int, nargs="+", default=[16, 32, 64, 128])
    options.add_argument("--fresh-per-task", type=int, default=24)
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    loaded = load_model(arguments.model, dtype=arguments.dtype)
    lines = lines_of(loaded, arguments)
    ways = [(encoding, group) for encoding in ENCODINGS for group in (*arguments.groups, WHOLE)]
    found = divergences(TwoStages(loaded.model, PruningPlan()), lines, ways)
    shape = KVShape.of_config(loaded.model.config, loaded.model.dtype)
    lengths = [len(line.prompt) for line in lines]
    recorder.write(
        prompt_tokens={"min": min(lengths), "max": max(lengths)},
        results=[row_of(way, found[way], lines, shape) for way in ways],
    )


def lines_of(loaded: LoadedModel, arguments: Namespace) -> Sequence[TokenizedLine]:
    """Validation lines: articles where they are given, or long questions of the test-bed."""
    draw = (
        ArticleLines.asked(loaded.tokenizer, arguments).drawn
        if arguments.articles
        else partial(drawn_lines, loaded.tokenizer, length="long")
    )
    return draw("validation", arguments.fresh_per_task, arguments.seed).lines


@torch.inference_mode()
def divergences(
    dense: TwoStages, lines: Sequence[TokenizedLine], ways: Sequence[Way]
) -> dict[Way, dict[int, float]]:
    """KL of every way and line, summed over the tokens that decode computes."""
    found: dict[Way, dict[int, float]] = {way: {} for way in ways}
    for batch in equal_batches(lines):
        prompts_BT, continuations_BC = padded(lines, batch)
        handed = dense.hand_over(prompts_BT)
        exact_BCV = dense.continued(handed, continuations_BC)
        for encoding, group in ways:
            size = group or prompts_BT.shape[1]
            coarse = replace(handed, prefix=in_groups(handed.prefix, encoding, size))
            coarse_BCV = dense.continued(coarse, continuations_BC)
            for row, index in enumerate(batch):
                tokens = slice(1, len(lines[index].continuation))
                gaps = kl(exact_BCV[row, tokens], coarse_BCV[row, tokens])
                found[encoding, group][index] = float(gaps.sum())
    return found


def row_of(
    way: Way, sums: dict[int, float], lines: Sequence[TokenizedLine], shape: KVShape
) -> dict[str, Any]:
    encoding, group = way
    tasks = sorted({line.task for line in lines})
    groups = [[i for i, line in enumerate(lines) if line.task == task] for task in tasks]
    tokens = [[float(len(lines[i].continuation) - 1) for i in each] for each in groups]
    means = [
        [sums[i] / n for i, n in zip(each, counts, strict=True)]
        for each, counts in zip(groups, tokens, strict=True)
    ]
    bound = upper_bound(means, weights=tokens, num_resamples=2_000)
    lengths = [len(line.prompt) for line in lines]
    sent = sum(encoded_bytes(shape, encoding, group or n, n) for n in lengths)
    return {
        "encoding": encoding,
        "group": group,
        "kl": bound.mean,
        "kl_upper_95": bound.upper,
        "reduction": sum(map(shape.dense_bytes, lengths)) / sent,
    }


def report(record: Record) -> list[Block]:
    asked, lengths = record["configuration"], record["prompt_tokens"]
    cells = []
    for row in record["results"]:
        name = "whole prompt" if row["group"] == WHOLE else f"{row['group']}"
        chosen = " (chosen)" if row["group"] == KEY_GROUP else ""
        cells.append(
            (
                row["encoding"],
                name + chosen,
                f"{row['kl']:.3g} ({row['kl_upper_95']:.3g})",
                f"{row['reduction']:.3f}x",
            )
        )
    return [
        f"Kept entries whose keys share a scale: {asked['caption'] or asked['model']}; "
        f"{asked['fresh_per_task']} lines per task of {lengths['min']} to {lengths['max']} tokens. "
        "KL to decode with all KV as it is, with its 95 % upper bound (bootstrap); bytes are codes "
        "and scales, without headers.",
        Table(("encoding", "entries per scale", "KL (at most)", "fewer bytes"), cells),
    ]


if __name__ == "__main__":
    run(parser(), measure, report)
