"""One self-contained HTML page about a plan: its removals, their reasons, costs and savings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rayapp.errors import InputError
from rayapp.evaluation.report.charts import (
    Share,
    byte_shares,
    fit_records,
    healing_records,
    removal_map,
    transfer_strips,
)
from rayapp.evaluation.report.findings import Findings, LedgerJSON
from rayapp.evaluation.report.kv_findings import KVFindings
from rayapp.evaluation.report.origins import model_caption, origins, provenance
from rayapp.evaluation.report.plots import (
    Plot,
    block_plot,
    front_panels,
    kv_path,
    loss_chart,
    removed_units,
    search_trace,
)
from rayapp.evaluation.report.transfer_bytes import forecast_transfer
from rayapp.evaluation.report.visual_charts import accuracy_chart, sample_pictures
from rayapp.evaluation.result import TaskResult
from rayapp.evaluation.table import tables
from rayapp.kv.header import DTYPES
from rayapp.plan import STAGES, PruningPlan

REPORT_FILE = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"
_PAGE = "page.html.jinja"
_DEFAULT_ENTRIES = 256
_DEFAULT_DTYPE = "bfloat16"


@cache
def _environment() -> Environment:
    """The environment of all reports: a template is compiled once, not once per report."""
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_report(path: str | Path, findings: Findings) -> Path:
    """Write :func:`render_report` to ``path``, creating its directory; returns the file.

    Raises:
        InputError: The file cannot be written.
    """
    page, target = render_report(findings), Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written ({error.strerror}); give another --out"
        ) from None
    return target


def render_report(findings: Findings) -> str:
    """The report as HTML; it refers to nothing outside itself, and suits light and dark screens.

    A section appears if its data exist. Every section says what it shows, and what it does not
    prove.
    """
    return (
        _environment()
        .get_template(_PAGE)
        .render(
            title="Pruning report",
            subtitle=_subtitle(findings),
            facts=_facts(findings),
            findings=findings,
            plan=findings.plan,
            plan_json=findings.plan.dumps(),
            num_blocks=_num_blocks(findings),
            score=score_words(findings.plan),
            num_lines=_lines(findings.plan.provenance),
            origins=origins(findings),
            provenance=provenance(findings.plan),
            **_removal(findings),
            **_quality(findings),
            **_visual(findings),
            **_transfer(findings),
            **_search(findings),
        )
    )


def _removal(findings: Findings) -> dict[str, Any]:
    healed = healing_records(findings.plan)
    cells = removal_map(findings.plan, _num_blocks(findings), healed)
    return {"healed": healed, "fits": fit_records(findings.plan), "removal": cells}


def _quality(findings: Findings) -> dict[str, Any]:
    evaluation = findings.evaluation
    return {
        "evaluation": evaluation,
        "losses": loss_chart(evaluation) if evaluation else None,
        "tables": tables(evaluation) if evaluation else (),
    }


def _visual(findings: Findings) -> dict[str, Any]:
    comparison = findings.visual
    return {
        "visual": comparison,
        "accuracy": accuracy_chart(comparison, findings.plan) if comparison else None,
        "pictures": sample_pictures(comparison) if comparison else (),
    }


def _transfer(findings: Findings) -> dict[str, Any]:
    plan, evaluation, kv = findings.plan, findings.evaluation, findings.kv
    mean = evaluation.mean if evaluation else None
    tokens = round(mean.mean_prompt_tokens) if mean else _DEFAULT_ENTRIES
    removed = _visual_tokens_removed(mean) if mean else 0
    dtype = evaluation.dtype if evaluation else _DEFAULT_DTYPE
    return {
        "strips": transfer_strips(plan, _num_blocks(findings), tokens - removed),
        "num_entries": tokens - removed,
        "num_removed": removed,
        "dtype": dtype,
        "bytes": _forecast(plan, tokens, removed, dtype),
        "kv": kv,
        "masses": {row.block: row for row in kv.mass} if kv else {},
        "kv_lines": _lines(plan.provenance.get("kv_select")),
        "kv_path": kv_path(kv.trace) if kv else None,
        "kv_effects": _kv_effects(kv, _num_blocks(findings)),
        "ledger": _ledger(findings.ledger),
    }


def _search(findings: Findings) -> dict[str, Any]:
    num_blocks = _num_blocks(findings)
    return {
        "similarity": _similarity(findings, num_blocks),
        "sensitivity": _sensitivity(findings, num_blocks),
        "trace": search_trace(findings.trials, findings.plan),
        "front": front_panels(findings.front, findings.plan),
    }


def _num_blocks(findings: Findings) -> int:
    """Number of the model's blocks; 0 if neither plan nor evaluation names it."""
    evaluation = findings.evaluation
    model = findings.plan.model or (evaluation.model if evaluation else None)
    return model.num_blocks if model else 0


def _subtitle(findings: Findings) -> str:
    caption, plan = model_caption(findings), findings.plan
    name = f"{caption}. " if caption else ""
    if plan.is_empty:
        return f"{name}The dense model: nothing is removed."
    removed = " and ".join(f"{plan.removed(stage):g} from {stage}" for stage in STAGES)
    model = plan.model
    of = f" of the {model.num_blocks} of {model.model_type}" if model else ""
    return f"{name}Blocks removed{of}: {removed} (a part counts one half)."


def score_words(plan: PruningPlan) -> str:
    """The meaning of the search's scores, from the plan's provenance; lower is better."""
    settings = plan.provenance.get("settings")
    settings = settings if isinstance(settings, Mapping) else {}
    kind = {"nll": "NLL of the answer"}.get(str(settings.get("objective")), "KL(dense || plan)")
    pooled = settings.get("score_by") == "token"
    mean = "mean over all tokens" if pooled else "mean over tasks"
    weight = settings.get("first_token_weight", 1)
    first = "" if weight == 1 else f", an answer's first token as {weight:g}"
    return f"{kind}, nats per answer token, {mean}{first}"


def _lines(record: Any) -> str:
    """The number of lines that a search scored on, in words, from its record."""
    lines = record.get("num_lines") if isinstance(record, Mapping) else None
    return f"{lines:,} calibration lines" if isinstance(lines, int) else "the calibration lines"


def _facts(findings: Findings) -> list[tuple[str, str]]:
    """The headline numbers, as ``(value, name)``."""
    plan, evaluation = findings.plan, findings.evaluation
    facts = [
        (f"{plan.removed('prefill'):g}", "blocks removed from prefill"),
        (f"{plan.removed('decode'):g}", "blocks removed from decode"),
    ]
    if evaluation and evaluation.mean:
        mean = evaluation.mean
        facts += [
            (f"{mean.kl.mean:.4f}", "KL to the dense model, nats per token"),
            (f"{mean.points_lost.upper:.2f}", "points lost at most, mean over tasks (95 %)"),
            (f"{mean.reduction:.2f}x", "fewer KV bytes sent"),
        ]
    else:
        facts += _calibration_facts(findings)
    for timing in evaluation.latency if evaluation else ():
        facts.append((f"{timing.speedup:.2f}x", f"faster answer, batch {timing.batch_size}"))
    return facts


def _calibration_facts(findings: Findings) -> list[tuple[str, str]]:
    """The results of the searches themselves, on the lines that they chose on."""
    plan, kv = findings.plan, findings.kv
    score = kv.score if kv else plan.provenance.get("score")
    facts = []
    if isinstance(score, float):
        facts.append((f"{score:.4g}", "score on the lines that chose the plan"))
    if kv:
        facts.append((f"{kv.reduction:.2f}x", "fewer KV bytes, the same lines"))
    return facts


@dataclass(frozen=True)
class _BytesView:
    """The fate of the bytes of one prompt's dense cache under the plan."""

    shares: list[Share]
    bytes_full: int
    bytes_sent: int
    overhead_bytes: int


def _visual_tokens_removed(mean: TaskResult) -> int:
    """Visual tokens removed from a mean prompt, by their bytes (all tokens weigh the same)."""
    return round(mean.mean_prompt_tokens * mean.saved_by_visual_tokens_bytes / mean.bytes_full)


def _forecast(
    plan: PruningPlan, num_tokens: int, num_removed: int, dtype: str
) -> _BytesView | None:
    if plan.model is None or dtype not in DTYPES:
        return None
    record = forecast_transfer(
        plan, num_tokens, DTYPES[dtype], num_visual_tokens_removed=num_removed
    )
    counts = (record[key] for key in ("bytes_full", "bytes_sent", "overhead_bytes"))
    return _BytesView(byte_shares(record), *counts)


def _kv_effects(kv: KVFindings | None, num_blocks: int) -> Plot | None:
    if kv is None or not kv.blocks:
        return None
    series = {
        "cut alone": {str(row.block): row.cut_alone for row in kv.blocks},
        "kept alone": {str(row.block): row.kept_alone for row in kv.blocks},
    }
    lines = {"all KV sent": kv.score_all_sent, "all blocks cut": kv.score_all_cut}
    return block_plot(series, num_blocks, lines=lines)


@dataclass(frozen=True)
class _UnitView:
    """A plot of values by unit, and the same as rows of a table: ``(stage, cells)``."""

    plot: Plot
    units: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    note: str


def _similarity(findings: Findings, num_blocks: int) -> _UnitView | None:
    influence = findings.influence
    if influence is None or not num_blocks:
        return None
    values = {
        stage: {str(b): max(0.0, v) for b, v in enumerate(influence.units(stage, num_blocks))}
        for stage in STAGES
    }
    lines = findings.influence_lines
    note = f"{lines:,} calibration lines" if lines else "the calibration lines of the search"
    return _by_unit(findings, values, num_blocks, _threshold(findings.plan), note)


def _threshold(plan: PruningPlan) -> dict[str, float]:
    """A line at one minus PDTrim's d_T, if the search split blocks by it."""
    settings = plan.provenance.get("settings")
    if not isinstance(settings, Mapping):
        return {}
    splits = settings.get("pruning_set") or "pair" in settings.get("heal", "")
    value = settings.get("distillation_threshold")
    return {f"d_T = {value:g}": 1 - value} if splits and isinstance(value, float) else {}


def _sensitivity(findings: Findings, num_blocks: int) -> _UnitView | None:
    singles = findings.singles
    if singles is None or not num_blocks:
        return None
    own = [trial.score for trial in findings.trials if trial.is_of(findings.plan)]
    lines = {"this plan": own[-1]} if own else {}
    return _by_unit(findings, singles.stages, num_blocks, lines, singles.source)


def _by_unit(
    findings: Findings,
    values: Mapping[Any, Mapping[str, float]],
    num_blocks: int,
    lines: Mapping[str, float],
    note: str,
) -> _UnitView:
    gone = {stage: removed_units(findings.plan, stage) for stage in STAGES}
    plot = block_plot(
        values,
        num_blocks,
        special=lambda stage, unit: unit in gone["decode" if stage == "decode" else "prefill"],
        lines=lines,
    )
    units = sorted({u for by_unit in values.values() for u in by_unit}, key=_unit_order)
    rows = tuple(
        (stage, tuple(f"{by_unit[u]:.4g}" if u in by_unit else "-" for u in units))
        for stage, by_unit in values.items()
    )
    return _UnitView(plot, tuple(units), rows, note)


def _unit_order(unit: str) -> tuple[int, str]:
    block, _, part = unit.partition(".")
    return int(block), part


@dataclass(frozen=True)
class _LedgerView:
    """The ledger as the page draws it."""

    num_transfers: int
    shares: list[Share]
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def _ledger(ledger: LedgerJSON | None) -> _LedgerView | None:
    """The ledger's view: one row per link, and their total; None without transfers."""
    if not ledger or not ledger["totals"].get("num_transfers"):
        return None
    totals = ledger["totals"]
    columns = ("link", "transfers", "bytes full", "bytes sent", "of it overhead", "reduction")
    rows = [
        _ledger_row(
            f"{str(link['source_node'])[:12]} to {str(link['destination_node'])[:12]}", link
        )
        for link in ledger.get("links", ())
    ]
    rows.append(_ledger_row("all links", totals))
    return _LedgerView(totals["num_transfers"], byte_shares(totals), columns, rows)


def _node(link: Mapping[str, Any], end: str) -> str:
    return str(link.get(f"{end}_node", "?"))[:12]


def _ledger_row(name: str, sums: Mapping[str, Any]) -> tuple[str, ...]:
    full, sent = sums["bytes_full"], sums["bytes_sent"]
    counts = (sums["num_transfers"], full, sent, sums["overhead_bytes"])
    return (name, *(f"{count:,}" for count in counts), f"{full / sent:.2f}x" if sent else "-")
