"""The ledger records the bytes of every transfer, and the bytes saved by every part of the plan.

The identity ``bytes_full = bytes_sent - overhead_bytes + savings`` holds to the byte. The savings
are counted in a fixed order, every one on what remains after those before it: visual tokens,
blocks, tokens, encoding.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedConfig

from rayapp.errors import IntegrityError
from rayapp.kv.cache import StackShape, held_entries
from rayapp.kv.quantize import buffer_sizes
from rayapp.kv.wire import MessageSizes
from rayapp.models.architecture import head_dim, sliding_windows, text_config
from rayapp.plan import PruningPlan

RECENT_RECORDS = 1000


@dataclass(frozen=True)
class KVShape:
    """The dimensions of a model's cache as plain data, so that they travel between processes."""

    num_blocks: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int
    windows: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if len(self.windows) != self.num_blocks:
            raise IntegrityError(f"{len(self.windows)} windows for {self.num_blocks} blocks")

    @classmethod
    def of(cls, stack: StackShape) -> KVShape:
        """Read the shape of a ``BlockStack`` or of a capture cache."""
        return cls(
            num_blocks=len(stack.windows),
            num_kv_heads=stack.num_kv_heads,
            head_dim=stack.head_dim,
            element_bytes=stack.dtype.itemsize,
            windows=tuple(stack.windows),
        )

    @classmethod
    def of_config(cls, config: PreTrainedConfig, dtype: torch.dtype) -> KVShape:
        """Derive the shape of a model's cache from its configuration and an element type."""
        text = text_config(config)
        return cls(
            num_blocks=text.num_hidden_layers,
            num_kv_heads=text.num_key_value_heads,
            head_dim=head_dim(config),
            element_bytes=dtype.itemsize,
            windows=sliding_windows(config),
        )

    @property
    def entry_bytes(self) -> int:
        """Number of bytes of one entry of one block: a key and a value of every KV head."""
        return 2 * self.num_kv_heads * self.head_dim * self.element_bytes

    def dense_bytes(self, num_tokens: int, blocks: Iterable[int] | None = None) -> int:
        """Number of bytes of the dense cache of ``num_tokens`` in ``blocks`` (all by default)."""
        chosen = range(self.num_blocks) if blocks is None else blocks
        return self.entry_bytes * sum(held_entries(num_tokens, self.windows[b]) for b in chosen)


@dataclass(frozen=True)
class Route:
    """Route of a transfer: the request, its attempt, the sending and the receiving node."""

    request_id: str
    attempt: int
    source_node: str
    destination_node: str


@dataclass(frozen=True)
class TransferTimes:
    """Seconds of a prompt's way from one stage to the other; parts of a message count together.

    A prompt waits for its turn (``queue_s``), is prefilled, packed and published (``put_s``),
    fetched, and copied into pages (``copy_s``). ``hidden_s`` of the last three overlap the prefill.
    """

    queue_s: float = 0.0
    prefill_s: float = 0.0
    put_s: float = 0.0
    fetch_s: float = 0.0
    copy_s: float = 0.0
    hidden_s: float = 0.0


@dataclass(frozen=True)
class TransferRecord:
    """Record of one transfer attempt; it cannot be made unless the module's identity holds."""

    request_id: str
    attempt: int
    source_node: str
    destination_node: str
    num_prompt_tokens: int
    num_visual_tokens_removed: int
    bytes_full: int
    bytes_sent: int
    overhead_bytes: int
    saved_by_visual_tokens_bytes: int
    saved_by_blocks_bytes: int
    saved_by_tokens_bytes: int
    saved_by_encoding_bytes: int
    queue_s: float
    prefill_s: float
    put_s: float
    fetch_s: float
    copy_s: float
    hidden_s: float
    gb_per_s: float | None

    def __post_init__(self) -> None:
        saved = (
            self.saved_by_visual_tokens_bytes
            + self.saved_by_blocks_bytes
            + self.saved_by_tokens_bytes
            + self.saved_by_encoding_bytes
        )
        if self.bytes_full != self.bytes_sent - self.overhead_bytes + saved:
            raise IntegrityError(
                f"request {self.request_id}: bytes_full {self.bytes_full} is not bytes_sent "
                f"{self.bytes_sent} - overhead_bytes {self.overhead_bytes} + savings {saved}"
            )


def account(
    shape: KVShape,
    plan: PruningPlan,
    sizes: MessageSizes,
    route: Route,
    *,
    num_prompt_tokens: int,
    num_visual_tokens_removed: int = 0,
    times: TransferTimes | None = None,
) -> TransferRecord:
    """Make the record of one transfer, and check the sent bytes against those the plan implies.

    Args:
        shape: The shape of the cache whose KV was sent.
        plan: The plan under which it was sent.
        sizes: The sizes of the message, from :func:`rayapp.kv.wire.message_sizes`.
        route: The request, its attempt and the nodes.
        num_prompt_tokens: Length of the unpruned prompt, visual tokens included.
        num_visual_tokens_removed: Number of visual tokens that were not run.
        times: The measured seconds; ``gb_per_s`` is bytes sent over ``fetch_s``, None if that is 0.

    Raises:
        IntegrityError: The payload is not what the plan sends of this prompt.
    """
    times = times or TransferTimes()
    num_tokens = num_prompt_tokens - num_visual_tokens_removed
    attending = [b for b in range(shape.num_blocks) if plan.mode("decode", b).attends]
    weights = [
        shape.dense_bytes(num_prompt_tokens),
        shape.dense_bytes(num_tokens),
        shape.dense_bytes(num_tokens, attending),
        *_kept_bytes(shape, plan, attending, num_tokens - (plan.first_token == "decode")),
    ]
    if weights[-1] != sizes.payload_bytes:
        raise IntegrityError(
            f"request {route.request_id}: the message holds {sizes.payload_bytes} bytes of KV, the "
            f"plan sends {weights[-1]} of {num_tokens} tokens; account with the plan packed"
        )
    by_visual, by_blocks, by_tokens, by_encoding = (
        before - after for before, after in itertools.pairwise(weights)
    )
    return TransferRecord(
        **asdict(route),
        num_prompt_tokens=num_prompt_tokens,
        num_visual_tokens_removed=num_visual_tokens_removed,
        bytes_full=weights[0],
        bytes_sent=sizes.total_bytes,
        overhead_bytes=sizes.overhead_bytes,
        saved_by_visual_tokens_bytes=by_visual,
        saved_by_blocks_bytes=by_blocks,
        saved_by_tokens_bytes=by_tokens,
        saved_by_encoding_bytes=by_encoding,
        **asdict(times),
        gb_per_s=_gb_per_s(sizes.total_bytes, times.fetch_s),
    )


def payload_bytes(shape: KVShape, plan: PruningPlan, num_prompt_tokens: int) -> int:
    """Bytes of KV, without headers, that a plan sends of a prompt none of whose tokens is pruned.

    Args:
        shape: The shape of the cache.
        plan: The plan under which it is sent.
        num_prompt_tokens: Length of the prompt.
    """
    attending = [b for b in range(shape.num_blocks) if plan.mode("decode", b).attends]
    num_prefilled = num_prompt_tokens - (plan.first_token == "decode")
    return _kept_bytes(shape, plan, attending, num_prefilled)[1]


def _kept_bytes(
    shape: KVShape, plan: PruningPlan, attending: Sequence[int], num_prefilled: int
) -> tuple[int, int]:
    """Number of bytes of the entries that travel: in the model's type, and as encoded."""
    raw = encoded = 0
    for block in attending:
        rule = plan.transfer(block)
        kept = sum(rule.counts(held_entries(num_prefilled, shape.windows[block])))
        raw += kept * shape.entry_bytes
        encoded += sum(
            buffer_sizes(
                rule.encoding, shape.num_kv_heads, kept, shape.head_dim, shape.element_bytes
            )
        )
    return raw, encoded


def _gb_per_s(num_bytes: int, seconds: float) -> float | None:
    return num_bytes / seconds / 1e9 if seconds > 0 else None


@dataclass
class Totals:
    """Sums over transfers; the fields have the names of :class:`TransferRecord`."""

    num_transfers: int = 0
    num_prompt_tokens: int = 0
    num_visual_tokens_removed: int = 0
    bytes_full: int = 0
    bytes_sent: int = 0
    overhead_bytes: int = 0
    saved_by_visual_tokens_bytes: int = 0
    saved_by_blocks_bytes: int = 0
    saved_by_tokens_bytes: int = 0
    saved_by_encoding_bytes: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    put_s: float = 0.0
    fetch_s: float = 0.0
    copy_s: float = 0.0
    hidden_s: float = 0.0

    def add(self, other: Totals | TransferRecord) -> None:
        """Add one record, or the sums of other transfers."""
        self.num_transfers += other.num_transfers if isinstance(other, Totals) else 1
        for column in fields(self)[1:]:
            setattr(self, column.name, getattr(self, column.name) + getattr(other, column.name))

    @property
    def reduction_factor(self) -> float | None:
        """Ratio ``bytes_full / bytes_sent``; None if nothing was sent."""
        return self.bytes_full / self.bytes_sent if self.bytes_sent else None

    def as_json(self) -> dict[str, Any]:
        """Return all sums, ``gb_per_s`` over all fetches, and ``reduction_factor``."""
        return {
            **asdict(self),
            "gb_per_s": _gb_per_s(self.bytes_sent, self.fetch_s),
            "reduction_factor": self.reduction_factor,
        }


@dataclass
class Ledger:
    """The ledger of one process: totals, totals per link, and the most recent records.

    Every method is synchronous, so tasks of one event loop cannot interleave in it; a ledger
    pickles.
    """

    capacity: int = RECENT_RECORDS
    totals: Totals = field(default_factory=Totals)
    links: dict[tuple[str, str], Totals] = field(default_factory=dict)
    recent: deque[TransferRecord] = field(init=False)

    def __post_init__(self) -> None:
        self.recent = deque(maxlen=self.capacity)

    def add(self, record: TransferRecord) -> None:
        """Add the record of one transfer attempt."""
        self.totals.add(record)
        self._link(record.source_node, record.destination_node).add(record)
        self.recent.append(record)

    @classmethod
    def merge(cls, ledgers: Iterable[Ledger], *, capacity: int = RECENT_RECORDS) -> Ledger:
        """Merge the ledgers of several ingress replicas; ``recent`` alternates between them."""
        merged = cls(capacity=capacity)
        sources = list(ledgers)
        for ledger in sources:
            merged.totals.add(ledger.totals)
            for (source, destination), totals in ledger.links.items():
                merged._link(source, destination).add(totals)
        newest_first = [list(reversed(ledger.recent)) for ledger in sources]
        longest = max(map(len, newest_first), default=0)
        taken = [records[i] for i in range(longest) for records in newest_first if i < len(records)]
        merged.recent.extend(reversed(taken))
        return merged

    def as_json(self) -> dict[str, Any]:
        """Return ``{"totals": {...}, "links": [...], "recent": [...]}``, the newest record last."""
        links = [
            {"source_node": source, "destination_node": destination, **totals.as_json()}
            for (source, destination), totals in sorted(self.links.items())
        ]
        return {
            "totals": self.totals.as_json(),
            "links": links,
            "recent": [asdict(record) for record in self.recent],
        }

    def to_parquet(self, path: str | Path) -> None:
        """Write the recent records, one row each."""
        rows = [asdict(record) for record in self.recent]
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), str(path))

    def _link(self, source: str, destination: str) -> Totals:
        return self.links.setdefault((source, destination), Totals())


_ARROW_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
_SCHEMA = pa.schema(
    [
        pa.field(column.name, _ARROW_TYPES[str(column.type).split(" ")[0]])
        for column in fields(TransferRecord)
    ]
)
