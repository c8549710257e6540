"""Claim: linear maps in closed form take half of the KL or more from removed spans, in seconds.

Each setting removes blocks from prefill (where their KV is still written) or from decode, and is
healed in several ways: not at all, by maps in closed form (`--heal linear`), by trained survivors
(`--heal all`, with as many steps as `--pair-steps` says), and by both (`--heal all+linear`). Maps
and survivors learn from one text; KL to the dense model and perplexity are judged on another one,
both cut into lines of `--prompt-tokens` that prefill runs and `--answer-tokens` that decode
continues. Every line runs on the stages that are served.

    python benchmarks/linear_healing.py --model M --heal-text train.txt --judge-text test.txt
"""

from __future__ import annotations

import math
import time
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from recorder.options import add_dtype, add_model, benchmark_parser
from recorder.record import Record
from recorder.run import Recorder, run
from recorder.table import Table

from rayapp.data.lines import TokenizedLine
from rayapp.errors import InputError
from rayapp.evaluation.measures.likelihood import TwoStages, line_likelihood
from rayapp.models.healed import HealedWeights, attach
from rayapp.models.loading import LoadedModel, load_model
from rayapp.plan import STAGES, PruningPlan
from rayapp.pruning.candidates.candidate import DENSE, Candidate
from rayapp.pruning.candidates.fits import Fit
from rayapp.pruning.candidates.healing import NO_HEALING, HealedUnit, Healing, Unit
from rayapp.pruning.healing.training import Healer
from rayapp.pruning.settings.training import Training

SETTINGS = ("prefill 18-27", "prefill 20-27", "decode 14", "decode 11-16", "decode 12,14,17")
CACHE_BYTES = 2 << 30


def parser() -> ArgumentParser:
    options = benchmark_parser(__doc__)
    add_model(options)
    add_dtype(options, "auto", auto=True)
    options.add_argument("--heal-text", type=Path, required=False, help="text that is learnt from")
    options.add_argument("--judge-text", type=Path, required=False, help="text that judges")
    options.add_argument("--heal-windows", type=int, default=24, help="lines to learn from")
    options.add_argument("--judge-windows", type=int, default=4, help="lines that judge")
    options.add_argument("--prompt-tokens", type=int, default=512, help="of a line, for prefill")
    options.add_argument("--answer-tokens", type=int, default=512, help="of a line, for decode")
    options.add_argument("--pair-steps", type=int, default=24, help="of the survivors' training")
    options.add_argument(
        "--settings", nargs="+", default=list(SETTINGS), help='as "prefill 18-27" or "decode 3,5"'
    )
    return options


def measure(recorder: Recorder) -> None:
    arguments = recorder.arguments
    loaded = load_model(arguments.model, dtype=arguments.dtype)
    heal_lines = lines_of(loaded, arguments.heal_text, arguments.heal_windows, arguments)
    judge_lines = lines_of(loaded, arguments.judge_text, arguments.judge_windows, arguments)
    judge = Judge(loaded, judge_lines)
    learner = Learner(loaded, heal_lines, arguments.pair_steps)
    rows: list[dict[str, Any]] = []
    for setting in arguments.settings:
        candidate = candidate_of(setting)
        for name, healing in healings(loaded.signature.num_blocks).items():
            if healing.served and all(f.before == DENSE for f in healing.fits(candidate)):
                continue  # the only span reads dense states
            weights, seconds = learner.weights(healing, candidate)
            kl, perplexity = judge.measured(candidate, weights)
            row = {"setting": setting, "healing": name, "kl": kl, "perplexity": perplexity}
            rows.append(row | {"heal_s": seconds, "bytes": num_bytes(weights)})
            print(f"{setting}, {name}: KL {kl:.4f}, perplexity {perplexity:.2f}", flush=True)
        dense = {"perplexity": judge.dense_perplexity, "states_s": learner.states_s}
        recorder.write(rows=rows, dense=dense)


def healings(num_blocks: int) -> dict[str, Healing]:
    pairs = Healing.of_all(num_blocks)
    return {
        "none": NO_HEALING,
        "linear": Healing(num_blocks, linear=True),
        "linear, served states": Healing(num_blocks, linear=True, served=True),
        "pairs": pairs,
        "pairs for one block, else linear": replace(pairs, linear=True),
    }


def candidate_of(setting: str) -> Candidate:
    """The candidate of words such as ``decode 11-16`` and ``prefill 3,5``."""
    stage, _, listed = setting.partition(" ")
    if stage not in STAGES or not listed:
        raise InputError(f"setting {setting!r}: write a stage and blocks, as in 'prefill 18-27'")
    blocks: list[int] = []
    for part in listed.split(","):
        first, _, last = part.partition("-")
        blocks += range(int(first), int(last or first) + 1)
    parts = tuple(part for block in sorted(blocks) for part in (2 * block, 2 * block + 1))
    return Candidate(prefill=parts) if stage == "prefill" else Candidate(decode=parts)


def lines_of(
    loaded: LoadedModel, text: Path | None, count: int, arguments: Any
) -> list[TokenizedLine]:
    """The first lines of a text: tokens that prefill runs, and tokens that decode continues."""
    if text is None:
        raise InputError("no text was given; give --heal-text and --judge-text")
    size, prompt = arguments.prompt_tokens + arguments.answer_tokens, arguments.prompt_tokens
    words = text.read_text(encoding="utf-8")[: 16 * count * size]
    ids = loaded.tokenizer(words, add_special_tokens=False)["input_ids"]
    if len(ids) < count * size:
        raise InputError(f"{text}: holds {len(ids)} tokens, {count * size} are needed")
    windows = [ids[start : start + size] for start in range(0, count * size, size)]
    return [TokenizedLine(tuple(w[:prompt]), tuple(w[prompt:]), "text") for w in windows]


class Learner:
    """Learns every unit of healing once, and tells the seconds that a candidate's units took."""

    def __init__(self, loaded: LoadedModel, lines: list[TokenizedLine], pair_steps: int) -> None:
        training = Training(steps=pair_steps)
        self._healer = Healer(loaded.model, lines, training=training, cache_bytes=CACHE_BYTES)
        self._known: dict[Unit, tuple[HealedUnit, float]] = {}
        self.states_s = self._pass_s(loaded.signature.num_blocks)

    def _pass_s(self, num_blocks: int) -> float:
        """Seconds of one pass over the lines, whose states all units learn from."""
        began_s = time.perf_counter()
        for stage in STAGES:
            self._healer.heal(Fit(stage, "bridge", num_blocks - 1, num_blocks, num_blocks - 1))
        return time.perf_counter() - began_s

    def weights(self, healing: Healing, candidate: Candidate) -> tuple[HealedWeights | None, float]:
        """The tensors that a candidate is healed with, and the seconds of learning them."""
        units = healing.units(candidate)
        tensors: dict[Any, dict[str, torch.Tensor]] = {stage: {} for stage in STAGES}
        for unit in units:
            tensors[unit.stage] |= self._healed(unit)[0].tensors
        seconds = math.fsum(self._healed(unit)[1] for unit in units)
        return (HealedWeights.of(tensors) if units else None), seconds

    def _healed(self, unit: Unit) -> tuple[HealedUnit, float]:
        if unit not in self._known:
            began_s = time.perf_counter()
            healed = self._healer.heal(unit)
            self._known[unit] = (healed, time.perf_counter() - began_s)
        return self._known[unit]


class Judge:
    """Runs lines through both stages, and compares them with the dense model's."""

    def __init__(self, loaded: LoadedModel, lines: list[TokenizedLine]) -> None:
        self._loaded, self._lines = loaded, lines
        self._dense = self._logits(PruningPlan())
        self.dense_perplexity = self._sums(self._dense)[1]

    def measured(self, candidate: Candidate, weights: HealedWeights | None) -> tuple[float, float]:
        """KL to the dense model per token, and perplexity."""
        plan = candidate.plan(self._loaded.signature)
        if weights is not None:
            attach(self._loaded.model, weights)
            plan = plan.with_healed(weights.digest)
        return self._sums(self._logits(plan))

    def _logits(self, plan: PruningPlan) -> list[torch.Tensor]:
        stages = TwoStages(self._loaded.model, plan)
        ids = [[torch.tensor([p]) for p in (li.prompt, li.continuation)] for li in self._lines]
        return [stages.logits(*both)[0] for both in ids]

    def _sums(self, logits: list[torch.Tensor]) -> tuple[float, float]:
        compared = [
            line_likelihood(dense_CV, plan_CV, line.continuation)
            for dense_CV, plan_CV, line in zip(self._dense, logits, self._lines, strict=True)
        ]
        tokens = sum(line.num_tokens for line in compared)
        kl = math.fsum(line.kl for line in compared) / tokens
        return kl, math.exp(math.fsum(line.plan_nll for line in compared) / tokens)


def num_bytes(weights: HealedWeights | None) -> int:
    stages = weights.stages.values() if weights else ()
    return sum(tensor.nbytes for tensors in stages for tensor in tensors.values())


def report(record: Record) -> list[str | Table]:
    options, dense = record["configuration"], record["dense"]
    tokens = options["prompt_tokens"], options["answer_tokens"]
    lines = (
        f"{options['heal_windows']} lines of {options['heal_text']} are learnt from, "
        f"{options['judge_windows']} lines of {options['judge_text']} judge; each has "
        f"{tokens[0]} tokens for prefill and {tokens[1]} for decode, which scores them. "
        f"Dense has a perplexity of {dense['perplexity']:.2f} there. One pass over the "
        f"lines, whose states everything is learnt from, took {dense['states_s']:.0f} s; seconds "
        f"in the table are beside it. Survivors take {options['pair_steps']} steps each."
    )
    rows = [
        [
            row["setting"],
            row["healing"],
            f"{row['kl']:.3f}",
            f"{row['perplexity']:.2f}",
            f"{row['heal_s']:.1f}" if row["bytes"] else "-",
            f"{row['bytes'] / 1e6:.1f}" if row["bytes"] else "-",
        ]
        for row in record["rows"]
    ]
    columns = ["removed", "healing", "KL", "perplexity", "seconds", "MB of tensors"]
    return [f"# {record['benchmark']}: {options['model']}", lines, Table(columns, rows)]


if __name__ == "__main__":
    run(parser(), measure, report)
