"""Trained pairs of a search: each trained once, kept by content under ``healed/``, and reused.

A file's name is a hash of everything that its tensors depend on, so later searches in the same
directory reuse the pairs that fit them, and no others.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from rayapp.models.healed import HealedWeights
from rayapp.plan import STAGES, Mode, PruningPlan, Stage
from rayapp.pruning.candidates.healing import HealedPair, Pair
from rayapp.pruning.settings.training import Training
from rayapp.pruning.storage import Storage

logger = logging.getLogger(__name__)

DIRECTORY = "healed"
VERSION = 1
"""Version of the training: pairs of another version are not reused."""

OnPair = Callable[[int, int], None]
"""A callback with the numbers of pairs trained so far and of pairs still to be trained."""


class PairCompute(Protocol):
    """The compute that trains pairs: this process, or evaluators of a cluster."""

    def heal(self, pairs: Sequence[Pair]) -> Iterator[HealedPair]:
        """Train every pair once; they come in any order, as they finish."""
        ...

    def add_healed(self, healed: HealedPair) -> None:
        """Make a trained pair known to the evaluators of candidates."""
        ...


@dataclass(frozen=True)
class _Known:
    """The digest and record of a pair that was added; its tensors lie in the storage."""

    digest: str
    record: Mapping[str, Any]


def pair_context(
    *, weights: str, data: str, first_token: Stage, dtype: str, training: Training
) -> dict[str, Any]:
    """Everything that trained tensors depend on beside the pair: model, lines, and training."""
    return {
        "version": VERSION,
        "weights": weights,
        "data": data,
        "first_token": first_token,
        "dtype": dtype,
        "training": asdict(training),
    }


def pair_file(context: Mapping[str, Any], pair: Pair) -> str:
    """The name of the file of a pair that was trained in a :func:`pair_context`."""
    content = {**context, "pair": str(pair)}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{digest[:24]}.safetensors"


class HealedPairs:
    """The trained pairs of a directory: it reads, trains and keeps them.

    Args:
        storage: The output directory.
        context: Everything that all tensors depend on, from :func:`pair_context`.
        compute: The compute that trains and uses pairs.
    """

    def __init__(self, storage: Storage, context: Mapping[str, Any], compute: PairCompute) -> None:
        self._storage = Storage(f"{storage.location}/{DIRECTORY}")
        self.context = context
        self._compute = compute
        self._known: dict[Pair, _Known] = {}

    def ensure(self, pairs: Iterable[Pair], on_pair: OnPair | None = None) -> None:
        """Train all pairs that are not at hand, and make all of them known to the compute.

        Raises:
            SearchError: A pair cannot be trained or written.
        """
        missing = []
        for pair in sorted({*pairs} - self._known.keys()):
            healed_pair = self._read(pair)
            if healed_pair is None:
                missing.append(pair)
            else:
                self.add(healed_pair)
        if missing and on_pair:
            on_pair(0, len(missing))
        for done, healed in enumerate(self._compute.heal(missing) if missing else (), start=1):
            self._storage.write_bytes(self._name(healed.pair), _dumps(healed))
            self.add(healed)
            if on_pair:
                on_pair(done, len(missing) - done)

    def digest(self, pair: Pair) -> str:
        """Hash of the tensors of a pair that :meth:`ensure` saw."""
        return self._known[pair].digest

    def record(self, pair: Pair) -> Mapping[str, Any]:
        """The record in a plan's provenance of a pair that :meth:`ensure` saw."""
        return self._known[pair].record

    def weights(self, pairs: Sequence[Pair]) -> HealedWeights:
        """All tensors of the pairs as a plan has them; no two survivors share a tensor."""
        self.ensure(pairs)
        stages: dict[Any, dict[str, torch.Tensor]] = {stage: {} for stage in STAGES}
        for pair in pairs:
            healed = self._read(pair) or next(iter(self._compute.heal([pair])))
            stages[pair.stage] |= healed.tensors
        return HealedWeights.of({stage: healed for stage, healed in stages.items() if healed})

    def add(self, healed: HealedPair) -> None:
        """Add a trained pair from elsewhere."""
        self._compute.add_healed(healed)
        self._known[healed.pair] = _Known(healed.weights.digest, healed.record())

    def _name(self, pair: Pair) -> str:
        return pair_file(self.context, pair)

    def _read(self, pair: Pair) -> HealedPair | None:
        name = self._name(pair)
        if not self._storage.exists(name):
            return None
        healed = _loads(pair, self._storage.read_bytes(name))
        if healed is None:
            logger.warning(
                "%s/%s: is damaged, the pair is trained again", self._storage.location, name
            )
        return healed


def _dumps(healed: HealedPair) -> bytes:
    record = json.dumps({**healed.record(), "digest": healed.weights.digest})
    return save(dict(healed.tensors), metadata={"record": record})


def _loads(pair: Pair, content: bytes) -> HealedPair | None:
    """Parse the bytes that :func:`_dumps` wrote; None if they are not whole."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        record = json.loads(header["__metadata__"]["record"])
        before, after = (float(record[f"relative_mse_{when}"]) for when in ("before", "after"))
        healed = HealedPair(pair, load(content), before, after)
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None
    return healed if healed.weights.digest == record["digest"] else None


def pairs_of_plan(plan: PruningPlan) -> list[HealedPair]:
    """The pairs of a healed plan with their tensors, for scoring variants of that plan.

    The provenance says which of two removed neighbours a survivor was trained for; the plan runs in
    the same way without that record.

    Raises:
        PlanError: The healed tensors cannot be used.
    """
    recorded = {(r["stage"], r["survivor"]): r for r in plan.provenance.get("healed", ())}
    pairs = []
    for stage, tensors in HealedWeights.load(plan).stages.items():
        by_block: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            by_block.setdefault(int(name.split(".")[1]), {})[name] = tensor
        for block, own in sorted(by_block.items()):
            record = recorded.get((stage, block), {})
            before = plan.mode(stage, block - 1) if block else Mode.FULL
            removed = block + 1 if before == Mode.FULL else block - 1
            losses = (float(record.get(f"relative_mse_{w}", "nan")) for w in ("before", "after"))
            pairs.append(
                HealedPair(Pair(stage, record.get("removed", removed), block), own, *losses)
            )
    return pairs
