"""The data of the report's drawings, block by block: plain numbers and labels, no markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayapp.plan import STAGES, Mode, PruningPlan, Stage

MODE_LABELS: dict[Mode, str] = {
    Mode.FULL: "full",
    Mode.ATTENTION_ONLY: "attn",
    Mode.MLP_ONLY: "mlp",
    Mode.MLP_AND_KV: "mlp+kv",
    Mode.KV_ONLY: "kv",
    Mode.REMOVED: "-",
}


@dataclass(frozen=True)
class HealingRecord:
    """A removed block and the trained neighbour that does its work, as the provenance records it.

    The errors are relative mean squared errors of the pair's output, before and after training.
    """

    stage: Stage
    removed: int
    survivor: int
    before: float
    after: float


def healing_records(plan: PruningPlan) -> tuple[HealingRecord, ...]:
    """The pairs of a healed plan; incomplete records are left out."""
    records = []
    for record in plan.provenance.get("healed", ()) if plan.healed else ():
        try:
            stage, blocks = record["stage"], (int(record["removed"]), int(record["survivor"]))
            errors = [float(record[f"relative_mse_{when}"]) for when in ("before", "after")]
        except (KeyError, TypeError, ValueError):
            continue
        if stage in STAGES:
            records.append(HealingRecord(stage, *blocks, *errors))
    return tuple(records)


@dataclass(frozen=True)
class FitRecord:
    """A linear map that healing solved for, as the provenance records it.

    ``what`` names it for people. The errors are relative mean squared errors on lines that were
    not fitted, without the map and with it.
    """

    stage: Stage
    what: str
    before: float
    after: float


_FIT_WORDS = {
    "bridge": "map over blocks {first} to {last}",
    "kv": "keys and values of block {block}, made of the state that enters block {first}",
}


def fit_records(plan: PruningPlan) -> tuple[FitRecord, ...]:
    """The linear maps of a healed plan; incomplete records are left out."""
    records = []
    for record in plan.provenance.get("healed", ()) if plan.healed else ():
        try:
            words, last = _FIT_WORDS[record["kind"]], int(record["stop"]) - 1
            what = words.format(first=int(record["first"]), last=last, block=int(record["block"]))
            errors = [float(record[f"relative_mse_{when}"]) for when in ("before", "after")]
        except (KeyError, TypeError, ValueError):
            continue
        if record.get("stage") in STAGES:
            records.append(FitRecord(record["stage"], what, *errors))
    return tuple(records)


@dataclass(frozen=True)
class BlockCell:
    """One block of one stage in the removal map.

    ``hands_over`` says that its KV goes to decode.

    ``healed_by`` is the survivor that does this block's work, ``heals`` the block whose work this
    one does.
    """

    stage: Stage
    block: int
    mode: Mode
    hands_over: bool
    healed_by: int | None = None
    heals: int | None = None

    @property
    def label(self) -> str:
        """The mode in at most six letters."""
        return MODE_LABELS[self.mode]


def removal_map(
    plan: PruningPlan, num_blocks: int, healed: Sequence[HealingRecord] = ()
) -> dict[Stage, list[BlockCell]]:
    """The removal map: every block's mode, per stage, and its part in a healed pair."""
    attended = [plan.mode("decode", block).attends for block in range(num_blocks)]
    healed_by = {(pair.stage, pair.removed): pair.survivor for pair in healed}
    heals = {(pair.stage, pair.survivor): pair.removed for pair in healed}
    return {
        stage: [
            BlockCell(
                stage,
                b,
                plan.mode(stage, b),
                stage == "prefill" and attended[b],
                healed_by.get((stage, b)),
                heals.get((stage, b)),
            )
            for b in range(num_blocks)
        ]
        for stage in STAGES
    }


@dataclass(frozen=True)
class TransferStrip:
    """The part of a prompt's KV that travels for one block.

    ``first`` and ``last`` are shares of the prompt's entries; both are 0 if nothing travels.
    """

    block: int
    first: float
    last: float
    text: str


def transfer_strips(plan: PruningPlan, num_blocks: int, num_entries: int) -> list[TransferStrip]:
    """Strips of all blocks for a prompt of ``num_entries`` tokens, one per block."""
    return [_strip(plan, block, num_entries) for block in range(num_blocks)]


def _strip(plan: PruningPlan, block: int, num_entries: int) -> TransferStrip:
    if not plan.mode("decode", block).attends:
        return TransferStrip(block, 0.0, 0.0, "not sent: decode does not attend")
    rule = plan.transfer(block)
    encoding = "" if rule.encoding == "model" else f", {rule.encoding}"
    first, last = rule.counts(num_entries)
    if first >= num_entries:
        return TransferStrip(block, 1.0, 0.0, f"all {num_entries}{encoding}")
    text = f"first {first}, last {last} of {num_entries}{encoding}"
    return TransferStrip(block, first / num_entries, last / num_entries, text)


@dataclass(frozen=True)
class Share:
    """One part of a stacked bar; ``start`` and ``width`` are shares of the whole.

    ``colour`` is the same for a part wherever it is drawn.
    """

    name: str
    num_bytes: int
    start: float
    width: float
    colour: int


LEDGER_PARTS = {
    "bytes_sent": "sent",
    "saved_by_visual_tokens_bytes": "saved by visual tokens",
    "saved_by_blocks_bytes": "saved by blocks",
    "saved_by_tokens_bytes": "saved by tokens",
    "saved_by_encoding_bytes": "saved by encoding",
}


def byte_shares(totals: Mapping[str, float]) -> list[Share]:
    """Shares of the dense cache's bytes by their fate; shares without bytes are left out."""
    parts = [(name, int(totals.get(key, 0))) for key, name in LEDGER_PARTS.items()]
    whole = sum(max(count, 0) for _, count in parts)
    shares, start = [], 0.0
    for colour, (name, count) in enumerate(parts):
        if count > 0:
            shares.append(Share(name, count, start, count / whole, colour))
            start += count / whole
    return shares
