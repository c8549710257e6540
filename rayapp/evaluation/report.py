"""One self-contained HTML page about a plan: what it removes, costs and saves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rayapp.errors import DataError
from rayapp.evaluation.charts import (
    Share,
    byte_shares,
    removal_map,
    search_trace,
    transfer_strips,
)
from rayapp.evaluation.result import EvaluationResult
from rayapp.evaluation.table import tables
from rayapp.plan import PruningPlan

TEMPLATE = "report.html.jinja"
_DEFAULT_ENTRIES = 256
_TRIAL_COLUMNS = ["prefill_removed", "decode_removed", "score"]

Trials = str | Path | Sequence[float]
LedgerJSON = Mapping[str, Any]


def write_report(
    path: str | Path,
    plan: PruningPlan,
    evaluation: EvaluationResult | None = None,
    trials: Trials | None = None,
    ledger: LedgerJSON | None = None,
) -> Path:
    """Write :func:`render_report` to ``path``, creating its directory; returns the file."""
    page = render_report(plan, evaluation, trials, ledger)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def render_report(
    plan: PruningPlan,
    evaluation: EvaluationResult | None = None,
    trials: Trials | None = None,
    ledger: LedgerJSON | None = None,
) -> str:
    """The report as HTML; it refers to nothing outside itself, and suits light and dark screens.

    Args:
        plan: The plan that it is about.
        evaluation: Dense beside plan.
        trials: The search's scores in the order of evaluation, or its ``trials.parquet``, of which
            those count that remove as much as ``plan`` (a search also scores the dense model).
        ledger: What ``GET /v1/transfers`` answers.

    Raises:
        DataError: If ``trials`` names a file that holds no scores.
    """
    num_blocks = _num_blocks(plan, evaluation)
    mean = evaluation.mean if evaluation else None
    entries = round(mean.mean_prompt_tokens) if mean else _DEFAULT_ENTRIES
    return str(
        _template().render(
            title="Pruning report",
            subtitle=_subtitle(plan),
            facts=_facts(plan, evaluation),
            plan=plan,
            plan_json=plan.dumps(),
            num_blocks=num_blocks,
            removal=removal_map(plan, num_blocks),
            strips=transfer_strips(plan, num_blocks, entries),
            num_entries=entries,
            trace=search_trace(_scores(trials, plan)) if trials is not None else None,
            evaluation=evaluation,
            tables=tables(evaluation) if evaluation else (),
            ledger=_ledger(ledger),
            origins=_origins(plan, evaluation),
        )
    )


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE)


def _num_blocks(plan: PruningPlan, evaluation: EvaluationResult | None) -> int:
    """Blocks of the model; 0 where neither plan nor evaluation names one."""
    model = plan.model or (evaluation.model if evaluation else None)
    return model.num_blocks if model else 0


def _subtitle(plan: PruningPlan) -> str:
    if plan.is_empty:
        return "The dense model: nothing is removed."
    removed = (
        f"{plan.removed('prefill'):g} blocks removed from prefill and "
        f"{plan.removed('decode'):g} from decode (a part counts one half)"
    )
    model = plan.model
    return f"{removed}; {model.model_type}, {model.num_blocks} blocks." if model else f"{removed}."


def _facts(plan: PruningPlan, evaluation: EvaluationResult | None) -> list[tuple[str, str]]:
    """The headline numbers, as ``(value, what it is)``."""
    facts = [
        (f"{plan.removed('prefill'):g}", "blocks removed from prefill"),
        (f"{plan.removed('decode'):g}", "blocks removed from decode"),
    ]
    if evaluation and evaluation.mean:
        mean = evaluation.mean
        facts += [
            (f"{mean.kl.mean:.4f}", "KL to the dense model, nats per token"),
            (f"{mean.points_lost.upper:.2f}", "points lost at most (95 %)"),
            (f"{mean.reduction:.2f}x", "fewer KV bytes sent"),
        ]
    for timing in evaluation.latency if evaluation else ():
        facts.append((f"{timing.speedup:.2f}x", f"faster answer, batch {timing.batch_size}"))
    return facts


@dataclass(frozen=True)
class _LedgerView:
    """The ledger as the page draws it."""

    num_transfers: int
    shares: list[Share]
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def _ledger(ledger: LedgerJSON | None) -> _LedgerView | None:
    """One row per link, and their total; None where nothing was transferred."""
    if not ledger or not ledger["totals"].get("num_transfers"):
        return None
    totals = ledger["totals"]
    columns = ("link", "transfers", "bytes full", "bytes sent", "of it overhead", "reduction")
    rows = [
        _ledger_row(f"{link['source_node'][:12]} to {link['destination_node'][:12]}", link)
        for link in ledger.get("links", ())
    ]
    rows.append(_ledger_row("all links", totals))
    return _LedgerView(totals["num_transfers"], byte_shares(totals), columns, rows)


def _ledger_row(name: str, sums: Mapping[str, Any]) -> tuple[str, ...]:
    full, sent = sums["bytes_full"], sums["bytes_sent"]
    counts = (sums["num_transfers"], full, sent, sums["overhead_bytes"])
    return (name, *(f"{count:,}" for count in counts), f"{full / sent:.2f}x" if sent else "-")


def _origins(plan: PruningPlan, evaluation: EvaluationResult | None) -> list[tuple[str, str]]:
    """Everything that tells how the numbers came about, as ``(name, value)``."""
    origins = [("plan", plan.fingerprint)]
    model = plan.model or (evaluation.model if evaluation else None)
    if model:
        origins.append(("weights", f"{model.model_type}, {model.weights_fingerprint}"))
    for name, value in plan.provenance.items():
        parts = value if isinstance(value, dict) else {"": value}
        origins += [(f"search: {name} {key}".rstrip(), _plain(v)) for key, v in parts.items()]
    if evaluation:
        machine = evaluation.machine
        origins += [
            (f"data: {data.name}", f"{data.num_examples:,} examples, sha256 {data.sha256}")
            for data in evaluation.data
        ]
        origins += [
            ("split", evaluation.settings.split or "not stated"),
            ("seed", str(evaluation.settings.seed)),
            ("element type", evaluation.dtype),
            ("hardware", f"{machine.processor}, {machine.device}, threads: {machine.num_threads}"),
            ("versions", ", ".join(f"{name} {v}" for name, v in machine.versions.items())),
            ("commit", machine.commit or "not known"),
        ]
    return origins


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _scores(trials: Trials, plan: PruningPlan) -> list[float]:
    """Scores in the order of evaluation."""
    if not isinstance(trials, str | Path):
        return list(trials)
    try:
        columns = pq.read_table(trials, columns=_TRIAL_COLUMNS).to_pydict()
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{trials}: no scores can be read ({reason}); give a search's trials.parquet"
        ) from None
    size = (plan.removed("prefill"), plan.removed("decode"))
    rows = zip(*(columns[name] for name in _TRIAL_COLUMNS), strict=True)
    return [score for *removed, score in rows if tuple(removed) == size]
