"""One model on its fresh examples: the losses, bytes and times of a plan, or of any two stages."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rayapp.data.lines import TokenizedLine
from rayapp.engine.local import LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.evaluation.bootstrap import upper_bound
from rayapp.evaluation.measures.latency import measure_latency
from rayapp.evaluation.measures.likelihood import LineLikelihood, TwoStages, likelihoods
from rayapp.evaluation.result import LatencyResult
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.models.blocks import signature_of
from rayapp.models.loading import LoadedModel, load_model
from rayapp.plan import PruningPlan
from rayapp.pruning.evaluator.calibration import load_calibration
from rayapp.pruning.kv_choice.bytes import KVBytes
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.search import SearchSettings
from rayapp.settings import filled
from rayapp.testbed import tasks
from rayapp.workflows.prune import prune

RESAMPLES = 2000


@dataclass(frozen=True)
class Sizes:
    """Numbers of lines, examples and runs of the measurements."""

    calibration_per_task: int = 64
    heal_per_task: int = 128
    fresh_per_task: int = 500
    runs: int = 30
    seeds: int = 3
    seed: int = 0


class Remembered:
    """A side whose states are computed once per batch, because the dense side meets every plan."""

    def __init__(self, side: TwoStages) -> None:
        self.plan, self.prefill, self.decode = side.plan, side.prefill, side.decode
        self._side, self._states = side, dict[bytes, torch.Tensor]()

    def hand_over_all(self, batches: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The prompts themselves, which prefill runs only if their states are not known."""
        return batches

    def predicting_states(
        self,
        prompts: Sequence[torch.Tensor],
        batches: Sequence[torch.Tensor],
        lengths: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """The states that predict every continuation token; see ``TwoStages``."""
        key = b"|".join(t.numpy().tobytes() for t in (*prompts, *batches, *lengths))
        if key not in self._states:
            handed = self._side.hand_over_all(prompts)
            self._states[key] = self._side.predicting_states(handed, batches, lengths)
        return self._states[key]


@dataclass
class Bench:
    """A model, its data, and a directory for the results of searches."""

    path: Path
    work: Path
    sizes: Sizes
    loaded: LoadedModel = field(init=False)
    lines: dict[str, list[TokenizedLine]] = field(init=False)

    def __post_init__(self) -> None:
        self.loaded = load_model(self.path, dtype="float32")
        self.dense = Remembered(TwoStages(self.loaded.model, PruningPlan()))
        self.lines = {
            length: self.tokenized("validation", self.sizes.fresh_per_task, 900_001, length)
            for length in ("short", "mixed")
        }

    @property
    def num_blocks(self) -> int:
        return signature_of(self.loaded.model).num_blocks

    def data(self, split: str, per_task: int, seed: int, length: str, only: str = "") -> Path:
        """A file of examples, written once."""
        path = self.work / f"{split}-{length}-{per_task}-{seed}{'-' + only if only else ''}.jsonl"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            names = (only,) if only else tasks.TASKS
            examples = [
                e for t in names for e in tasks.generate(t, split, per_task, seed, length=length)
            ]
            tasks.write_jsonl(path, examples)
        return path

    def calibration(self, length: str = "short", only: str = "") -> Path:
        per_task = self.sizes.calibration_per_task * (len(tasks.TASKS) if only else 1)
        return self.data("calibration", per_task, self.sizes.seed, length, only)

    def heal_data(self) -> Path:
        return self.data("heal", self.sizes.heal_per_task, self.sizes.seed, "mixed")

    def tokenized(self, split: str, count: int, seed: int, length: str) -> list[TokenizedLine]:
        """Fresh examples as the engines see them."""
        return list(
            load_calibration(self.data(split, count, seed, length), self.loaded.tokenizer).lines
        )

    def search(self, name: str, **settings: Any) -> tuple[PruningPlan, dict[str, Any]]:
        """Run a search, or resume it where it stopped; gives its plan, and its costs."""
        out = self.work / "plans" / name
        record = out / "took.json"
        if not record.is_file():
            wanted = {
                "model": str(self.path),
                "calibration": str(self.calibration()),
                "out": str(out),
                "dtype": "float32",
                "resume": (out / "journal.jsonl").is_file(),
                "seed": self.sizes.seed,
            } | settings
            result = prune(*filled(wanted, ScoreSettings, ComputeSettings, SearchSettings))
            took = {
                "evaluations": result.evaluations,
                "search_s": result.seconds,
                "score": result.score.value,
            }
            record.write_text(json.dumps(took))
        return PruningPlan.load(out), json.loads(record.read_text())

    def quality(self, side: TwoStages, length: str = "short") -> dict[str, Any]:
        """KL and points lost on the fresh examples with 95 % upper bounds; tasks count alike."""
        lines = self.lines[length]
        dense: Any = self.dense
        sums = dict(likelihoods(dense, side, lines))
        groups = [
            [sums[i] for i, line in enumerate(lines) if line.task == task] for task in tasks.TASKS
        ]
        lost = [[100.0 * (e.dense_match - e.plan_match) for e in group] for group in groups]
        kl = upper_bound(
            [[e.kl / e.num_tokens for e in group] for group in groups],
            weights=[[float(e.num_tokens) for e in group] for group in groups],
            num_resamples=RESAMPLES,
        )
        bounds = [upper_bound([each], num_resamples=RESAMPLES) for each in lost]
        worst = max(range(len(bounds)), key=lambda i: bounds[i].mean)
        return {
            "kl": kl.mean,
            "kl_upper": kl.upper,
            "dense_match": _shares(groups, "dense_match"),
            "plan_match": _shares(groups, "plan_match"),
            "mean_lost": sum(b.mean for b in bounds) / len(bounds),
            "worst_task": tasks.TASKS[worst],
            "worst_lost": bounds[worst].mean,
            "worst_lost_upper": max(bound.upper for bound in bounds),
        }

    def reduction(self, plan: PruningPlan, length: str = "mixed") -> float:
        """Bytes of the dense caches over bytes sent, engine in bf16, headers included."""
        lengths = [len(line.prompt) for line in self.lines[length]]
        weighed = self._bytes(plan, lengths)
        return weighed.full / weighed.sent(plan.kv_transfer)

    def side(self, plan: PruningPlan) -> TwoStages:
        return TwoStages(self.loaded.model, plan)

    def bytes_sent(self, plan: PruningPlan, num_prompt_tokens: int) -> int:
        """Bytes of one prompt's message in bf16; an empty plan is the dense model."""
        return self._bytes(plan, [num_prompt_tokens]).sent(plan.kv_transfer)

    def codec_ms(self, plan: PruningPlan, num_prompt_tokens: int) -> float:
        """Median milliseconds of cutting, encoding, packing, unpacking and decoding one prompt's
        KV.
        """
        pipeline = LocalPipeline(self.loaded.model, plan=plan)
        prompts = [list(range(3, 3 + num_prompt_tokens))] * max(1, self.sizes.runs)
        done = pipeline.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True))
        records = [each.transfer for each in done if each.transfer is not None]
        return 1e3 * statistics.median(record.put_s + record.fetch_s for record in records)

    def _bytes(self, plan: PruningPlan, lengths: list[int]) -> KVBytes:
        config = copy.deepcopy(self.loaded.model.config)
        config.dtype = torch.bfloat16
        return KVBytes(config, plan, lengths)

    def speed(self, side: TwoStages, batch_size: int = 1) -> LatencyResult:
        settings = EvaluationSettings(num_runs=self.sizes.runs)
        dense: Any = self.dense
        return measure_latency(dense, side, settings, batch_size=batch_size)

    def plan_row(self, plan: PruningPlan, length: str = "short") -> dict[str, Any]:
        """The row of one plan, without its speed in batches."""
        side = self.side(plan)
        words = {"reduction": self.reduction(plan), "plan": plan_words(plan)}
        return self.quality(side, length) | self.speedups(side) | words

    def speedups(self, side: TwoStages) -> dict[str, float]:
        """Speed-ups at batch 1 of answer, prefill and decode; empty without timed runs."""
        if not self.sizes.runs:
            return {}
        timing = self.speed(side)
        return {
            "speedup": timing.speedup,
            "ttft_speedup": timing.ttft_speedup,
            "tpot_speedup": timing.tpot_speedup,
        }


def plan_words(plan: PruningPlan) -> str:
    """The blocks that each stage does not run in full."""
    return "; ".join(
        f"{stage} "
        + (", ".join(f"{b} {m}" for b, m in sorted(plan.stage(stage).blocks.items())) or "-")
        for stage in ("prefill", "decode")
    )


def _shares(groups: Sequence[Sequence[LineLikelihood]], name: str) -> dict[str, float]:
    pairs = zip(tasks.TASKS, groups, strict=True)
    return {task: sum(getattr(e, name) for e in group) / len(group) for task, group in pairs}
