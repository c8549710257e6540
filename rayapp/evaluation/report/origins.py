"""The origins of a report's numbers, as ``(name, value)``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rayapp.evaluation.report.findings import Findings
from rayapp.plan import PruningPlan

_IN_SECTIONS = ("healed",)
"""Parts of the provenance that the page shows elsewhere."""

Rows = list[tuple[str, str]]


def model_caption(findings: Findings) -> str:
    """The caption of the model, from the plan's provenance or the evaluation; empty for most."""
    recorded = findings.plan.provenance.get("model")
    known = recorded.get("caption") if isinstance(recorded, Mapping) else None
    evaluation = findings.evaluation
    return str(known or (evaluation.model_caption if evaluation else ""))


def origins(findings: Findings) -> Rows:
    """The plan, weights, data and machine behind a report."""
    plan, evaluation = findings.plan, findings.evaluation
    caption = model_caption(findings)
    rows = [("plan", plan.fingerprint), *([("model", caption)] if caption else [])]
    model = plan.model or (evaluation.model if evaluation else None)
    if model:
        rows.append(("weights", f"{model.model_type}, {model.weights_fingerprint}"))
    if plan.healed:
        rows.append(("healed tensors", plan.healed))
    if evaluation is None:
        return rows
    settings, machine = evaluation.settings, evaluation.machine
    rows += [
        (f"data: {data.name}", f"{data.num_examples:,} examples, sha256 {data.sha256}")
        for data in evaluation.data
    ]
    return [
        *rows,
        ("split", settings.split or "not stated"),
        ("seed", str(settings.seed)),
        ("element type", evaluation.dtype),
        ("hardware", f"{machine.processor}, {machine.device}, threads: {machine.num_threads}"),
        ("versions", ", ".join(f"{name} {v}" for name, v in machine.versions.items())),
        ("commit", machine.commit or "not known"),
    ]


def provenance(plan: PruningPlan) -> Rows:
    """The records of the searches in the plan; one level of objects is taken apart."""
    rows: Rows = []
    for name, value in plan.provenance.items():
        if name not in _IN_SECTIONS:
            parts = value if isinstance(value, dict) else {"": value}
            rows += [
                (f"{name} {key}".rstrip(), _plain(part))
                for key, part in parts.items()
                if (name, key) != ("seen", "prompts") and key != "seen"
            ]
    return rows


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
