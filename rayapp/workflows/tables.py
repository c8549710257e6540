"""Tables of plans, KV selections and ledgers, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rayapp.plan import HEALED_FILE, STAGES, KVTransfer, Mode, PruningPlan

if TYPE_CHECKING:  # They need torch, and `rayapp plan show` must not wait for that.
    from rayapp.pruning.kv_choice.result import KVSelection
    from rayapp.workflows.doctor import Finding

_MODE_STYLES = {
    Mode.FULL: "dim",
    Mode.ATTENTION_ONLY: "cyan",
    Mode.MLP_ONLY: "cyan",
    Mode.MLP_AND_KV: "yellow",
    Mode.KV_ONLY: "yellow",
    Mode.REMOVED: "bold red",
}
_STATUS_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}
_SAVINGS = ("visual_tokens", "blocks", "tokens", "encoding")


def plan_tables(plan: PruningPlan) -> list[RenderableType]:
    """A line that describes the plan, and a table with a row for every block."""
    if plan.model is None:
        return [Text("empty plan: the dense model, exactly (fits every model)")]
    removed = ", ".join(f"{plan.removed(stage):g} from {stage}" for stage in STAGES)
    head = (
        f"plan {plan.fingerprint} for {_caption(plan)}{plan.model.model_type} of "
        f"{plan.model.num_blocks} blocks (weights {plan.model.weights_fingerprint})\n"
        f"blocks removed: {removed}; first answer token from {plan.first_token}"
    )
    healed = _healed(plan)
    if plan.healed:
        head += f"\nhealed tensors: {plan.healed} in {HEALED_FILE}"
    table = Table("block", "prefill", "decode", "KV sent", "encoding")
    for block in range(plan.model.num_blocks):
        modes = [plan.mode(stage, block) for stage in STAGES]
        cells = [
            Text(mode, style=_MODE_STYLES[mode]) + Text(healed.get((stage, block), ""), "green")
            for stage, mode in zip(STAGES, modes, strict=True)
        ]
        rule = plan.transfer(block)
        sent = _amount(rule) if modes[1].attends else "-"
        table.add_row(str(block), *cells, sent, rule.encoding if modes[1].attends else "-")
    parts: list[RenderableType] = [Text(head), table]
    if plan.visual_tokens:
        parts.append(Text(f"visual tokens: {plan.visual_tokens.model_dump_json()}"))
    return parts


def _caption(plan: PruningPlan) -> str:
    """The model's caption, if the plan's provenance has one, as the beginning of a sentence."""
    model = plan.provenance.get("model")
    caption = model.get("caption") if isinstance(model, Mapping) else None
    return f"{caption}: " if caption else ""


def kv_table(selection: KVSelection) -> RenderableType:
    """A table with a row for every block where decode attends: its measurements and its rule."""
    table = Table(
        "block", "mass kept", "KL, cut alone", "KL, kept alone", "KV sent", "encoding",
        title=f"KL {selection.score:.4g} at {selection.reduction:.2f}x fewer bytes; "
        f"{selection.base_score:.4g} with all KV, {selection.cut_score:.4g} with every block cut",
    )  # fmt: skip
    for block in selection.blocks:
        effects = (block.mass.kept, block.cut_alone, block.kept_alone)
        cells = [f"{effects[0]:.3f}", *(f"{effect:.4g}" for effect in effects[1:])]
        table.add_row(str(block.block), *cells, _amount(block.rule), block.rule.encoding)
    return table


def finding_line(finding: Finding) -> RenderableType:
    """A line with the finding of one check of the doctor, and the remedy below it."""
    line = Text(f"{finding.status:8}", _STATUS_STYLES[finding.status])
    line += Text(f"{finding.name:14}{finding.found}")
    if finding.remedy:
        line += Text(f"\n{'':22}{finding.remedy}", "dim")
    return line


def _healed(plan: PruningPlan) -> dict[tuple[str, int], str]:
    """Notes on healed blocks by stage and block: what healed them, and the error left."""
    notes: dict[tuple[str, int], str] = {}
    for record in plan.provenance.get("healed", ()):
        place, what = _healing_note(record)
        errors = (record[f"relative_mse_{when}"] for when in ("before", "after"))
        notes[place] = notes.get(
            place, ""
        ) + " + {} (healed, relative MSE {:.2g} to {:.2g})".format(what, *errors)
    return notes


def _healing_note(record: Mapping[str, Any]) -> tuple[tuple[str, int], str]:
    """The stage and block that a record of healing is about, and the words for it."""
    stage = record["stage"]
    if "survivor" in record:
        return (stage, record["survivor"]), f"{record['removed']}"
    words = {
        "kv": "KV refit from {first}",
        "bridge": "bridge {first} to {stop}",
    }
    return (stage, record["block"]), words[record["kind"]].format(**record)


def _amount(rule: KVTransfer) -> str:
    if rule.keeps_all:
        return "all"
    spelled = [
        f"{name} {amount if isinstance(amount, int) else f'{amount:.0%}'}"
        for name, amount in (("first", rule.first), ("last", rule.last))
        if amount
    ]
    return " + ".join(spelled)


def ledger_tables(ledger: dict[str, Any]) -> list[RenderableType]:
    """Tables of a ledger: the totals with the savings of every part of the plan, and the links.

    Args:
        ledger: The JSON of ``GET /v1/transfers``.
    """
    totals = ledger["totals"]
    sums = Table("transfer ledger", "bytes", title_justify="left")
    sums.add_row("full (dense cache of the prompts)", f"{totals['bytes_full']:,}")
    for saving in _SAVINGS:
        sums.add_row(f"  saved by {saving}".replace("_", " "), f"-{totals[_key(saving)]:,}")
    sums.add_row("  header and padding", f"+{totals['overhead_bytes']:,}")
    sums.add_row("sent", f"{totals['bytes_sent']:,}", style="bold")
    factor = totals["reduction_factor"]
    sums.add_row("reduction factor", f"{factor:.3f}x" if factor else "nothing sent")
    links = Table("from", "to", "transfers", "bytes full", "bytes sent", "GB/s")
    for link in ledger["links"]:
        rate = link["gb_per_s"]
        links.add_row(
            link["source_node"][:12],
            link["destination_node"][:12],
            f"{link['num_transfers']:,}",
            f"{link['bytes_full']:,}",
            f"{link['bytes_sent']:,}",
            f"{rate:.3f}" if rate else "-",
        )
    return [sums, links]


def _key(saving: str) -> str:
    return f"saved_by_{saving}_bytes"
