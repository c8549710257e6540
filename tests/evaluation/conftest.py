"""A plan, an evaluation of it, and the files that searches leave: what reports are made of."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayapp.evaluation.bootstrap import Bound
from rayapp.evaluation.machine import this_machine
from rayapp.evaluation.result import (
    DataFile,
    EvaluationResult,
    LatencyResult,
    PlanSummary,
    StageTimes,
    TaskResult,
)
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.plan import KVTransfer, Mode, ModelSignature, PruningPlan, StagePlan

MODEL = ModelSignature(
    model_type="llama",
    num_blocks=6,
    hidden_size=48,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=300,
    weights_fingerprint="feedc0de",
)
Row = tuple[list[str], list[str], float, int]


@pytest.fixture
def plan() -> PruningPlan:
    """A plan with every mode, two transfer rules, and a provenance that is no HTML."""
    prefill = {
        1: Mode.KV_ONLY,
        2: Mode.MLP_AND_KV,
        3: Mode.REMOVED,
        4: Mode.MLP_ONLY,
        5: Mode.ATTENTION_ONLY,
    }
    return PruningPlan(
        model=MODEL,
        prefill=StagePlan(blocks=prefill),
        decode=StagePlan(blocks={3: Mode.REMOVED, 4: Mode.MLP_ONLY}),
        kv_transfer={0: KVTransfer(first=4, last=16), 1: KVTransfer(encoding="int4")},
        provenance={"method": "<script>alert(1)</script>", "scores": {"kl": 0.0123}},
    )


@pytest.fixture
def blocks_plan() -> PruningPlan:
    """A plan of whole blocks only: prefill without 1 and 3, decode without 3."""
    return PruningPlan(
        model=MODEL,
        prefill=StagePlan(blocks={1: Mode.KV_ONLY, 3: Mode.REMOVED}),
        decode=StagePlan(blocks={3: Mode.REMOVED}),
        provenance={"settings": {"objective": "kl", "score_by": "task"}, "num_lines": 48},
    )


@pytest.fixture
def task_row() -> Callable[..., TaskResult]:
    """A function that makes a task's row: ``task_row("copy", num_examples=2_000)``."""

    def row(task: str, **changes: object) -> TaskResult:
        fields = {
            "task": task,
            "num_examples": 40,
            "num_tokens": 200,
            "min_prompt_tokens": 100,
            "mean_prompt_tokens": 200.0,
            "max_prompt_tokens": 300,
            "dense_nll": 0.01,
            "plan_nll": 0.02345,
            "kl": Bound(mean=0.0312, upper=0.04, num_examples=40),
            "dense_exact_match": 1.0,
            "plan_exact_match": 0.95,
            "points_lost": Bound(mean=5.0, upper=11.25, num_examples=40),
            "bytes_full": 8_000_000,
            "bytes_sent": 2_000_000,
            "overhead_bytes": 40_000,
        }
        return TaskResult.model_validate(fields | changes)

    return row


@pytest.fixture
def evaluate_as(task_row) -> Callable[[PruningPlan], EvaluationResult]:
    """A function that makes an evaluation of any plan."""

    def made(plan: PruningPlan) -> EvaluationResult:
        summary = PlanSummary(
            fingerprint=plan.fingerprint, is_empty=False, prefill_removed=3.0, decode_removed=1.5
        )
        return EvaluationResult(
            complete=True,
            model=MODEL,
            dtype="bfloat16",
            plan=summary,
            settings=EvaluationSettings(split="validation"),
            data=(DataFile(name="validation.jsonl", sha256="ab" * 32, num_examples=80),),
            tasks=(task_row("copy"), task_row("so|rt", min_prompt_tokens=130)),
            mean=task_row("mean", num_examples=80),
            latency=(
                LatencyResult(
                    num_prompt_tokens=128,
                    num_answer_tokens=64,
                    batch_size=8,
                    num_runs=30,
                    num_threads=1,
                    dense=StageTimes(prefill_ms=20, tpot_ms=10, answer_ms=650),
                    plan=StageTimes(prefill_ms=10, tpot_ms=8, answer_ms=520),
                ),
            ),
            machine=this_machine(device="cpu", num_threads=1),
        )

    return made


@pytest.fixture
def evaluation(evaluate_as, plan) -> EvaluationResult:
    return evaluate_as(plan)


@pytest.fixture
def ledger() -> dict[str, Any]:
    """The answer of ``GET /v1/transfers``."""
    totals = {
        "num_transfers": 12,
        "bytes_full": 10_000,
        "bytes_sent": 4_100,
        "overhead_bytes": 100,
        "saved_by_visual_tokens_bytes": 0,
        "saved_by_blocks_bytes": 2_000,
        "saved_by_tokens_bytes": 3_000,
        "saved_by_encoding_bytes": 1_000,
    }
    link = {**totals, "source_node": "<b>node</b>", "destination_node": "other"}
    return {"totals": totals, "links": [link], "recent": []}


@pytest.fixture
def parquet() -> Callable[[Sequence[Row]], bytes]:
    """A function that makes a ``trials.parquet`` of ``(prefill, decode, score, chunks)``."""

    def written(rows: Sequence[Row]) -> bytes:
        prefill, decode, scores, chunks = map(list, zip(*rows, strict=True))
        columns = {"prefill": prefill, "decode": decode, "score": scores, "chunks": chunks}
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink)
        return sink.getvalue()

    return written


@pytest.fixture
def kv_json() -> Callable[..., bytes]:
    """A function that makes a ``kv.json`` of a plan; ``change`` replaces entries."""

    def written(plan: PruningPlan, **change: object) -> bytes:
        attending = [b for b in range(MODEL.num_blocks) if plan.mode("decode", b).attends]
        rules = {b: r.model_dump(exclude_none=True) for b, r in plan.kv_transfer.items()}
        content = {
            "complete": True,
            "subject": {"plan": plan.model_copy(update={"kv_transfer": {}}).fingerprint},
            "settings": {"method": "elimination", "target_reduction": 5.0},
            "mass": [
                {"block": b, "first": 0.125, "last": 0.25, "new": 0.5, "kept": 0.875}
                for b in attending
            ],
            "blocks": [
                {"block": b, "cut_alone": 0.01 * (b + 1), "kept_alone": 2.0} for b in attending
            ],
            "trace": [
                {"phase": "start", "score": 4.5, "bytes_sent": 1_000, "reduction": 40.0},
                {"phase": "polish", "score": 0.0875, "bytes_sent": 8_000, "reduction": 5.0},
            ],
            "kv_transfer": rules,
            "score": 0.0875,
            "score_all_sent": 0.0625,
            "score_all_cut": 4.5,
            "bytes_full": 40_000,
            "bytes_sent": 8_000,
            "reduction": 5.0,
            "evaluations": 321,
        }
        return json.dumps(content | change).encode()

    return written


@pytest.fixture
def write(tmp_path) -> Callable[[str, bytes | str | dict], Path]:
    """A function ``write("a/b.json", {...})`` that writes under the test's directory."""

    def written(name: str, content: bytes | str | dict) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written
