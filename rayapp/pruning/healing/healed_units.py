"""Healed units of a search: each learnt once, kept by content under ``healed/``, and reused.

A file's name is a hash of everything that its tensors depend on, so later searches in the same
directory reuse the units that fit them, and no others.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from rayapp.models.healed import BRIDGE, HealedWeights
from rayapp.plan import STAGES, Mode, PruningPlan, Stage
from rayapp.pruning.candidates.fits import Fit, FitKind
from rayapp.pruning.candidates.healing import HealedUnit, Pair, Unit, unit_order
from rayapp.pruning.settings.training import Training
from rayapp.pruning.storage import Storage

logger = logging.getLogger(__name__)

DIRECTORY = "healed"
VERSION, FIT_VERSION = 1, 1
"""Versions of the training and of the fits: units of another version are not reused."""

OnUnit = Callable[[int, int], None]
"""A callback with the numbers of units trained so far and of units still to be trained."""


class UnitCompute(Protocol):
    """The compute that trains units: this process, or evaluators of a cluster."""

    def heal(self, units: Sequence[Unit]) -> Iterator[HealedUnit]:
        """Train every unit once; they come in any order, as they finish."""
        ...

    def add_healed(self, healed: HealedUnit) -> None:
        """Make a trained unit known to the evaluators of candidates."""
        ...


@dataclass(frozen=True)
class _Known:
    """The digest and record of a unit that was added; its tensors lie in the storage."""

    digest: str
    record: Mapping[str, Any]


def unit_context(
    *, weights: str, data: str, first_token: Stage, dtype: str, training: Training
) -> dict[str, Any]:
    """Everything that trained tensors depend on beside the unit: model, lines, and training."""
    return {
        "version": VERSION,
        "weights": weights,
        "data": data,
        "first_token": first_token,
        "dtype": dtype,
        "training": asdict(training),
    }


def unit_file(context: Mapping[str, Any], unit: Unit) -> str:
    """The name of the file of a unit that was trained in a :func:`unit_context`."""
    content = {**context, "pair": str(unit)}
    if isinstance(unit, Fit):  # a fit takes no training steps
        content |= {"version": FIT_VERSION, "training": None, "block": unit.block}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{digest[:24]}.safetensors"


class HealedUnits:
    """The trained units of a directory: it reads, trains and keeps them.

    Args:
        storage: The output directory.
        context: Everything that all tensors depend on, from :func:`unit_context`.
        compute: The compute that trains and uses units.
    """

    def __init__(self, storage: Storage, context: Mapping[str, Any], compute: UnitCompute) -> None:
        self._storage = Storage(f"{storage.location}/{DIRECTORY}")
        self.context = context
        self._compute = compute
        self._known: dict[Unit, _Known] = {}

    def ensure(self, units: Iterable[Unit], on_unit: OnUnit | None = None) -> None:
        """Train all units that are not at hand, and make all of them known to the compute.

        Raises:
            SearchError: A unit cannot be trained or written.
        """
        missing = []
        for unit in sorted({*units} - self._known.keys(), key=unit_order):
            healed_unit = self._read(unit)
            if healed_unit is None:
                missing.append(unit)
            else:
                self.add(healed_unit)
        if missing and on_unit:
            on_unit(0, len(missing))
        for done, healed in enumerate(self._compute.heal(missing) if missing else (), start=1):
            self._storage.write_bytes(self._name(healed.unit), _dumps(healed))
            self.add(healed)
            if on_unit:
                on_unit(done, len(missing) - done)

    def digest(self, unit: Unit) -> str:
        """Hash of the tensors of a unit that :meth:`ensure` saw."""
        return self._known[unit].digest

    def record(self, unit: Unit) -> Mapping[str, Any]:
        """The record in a plan's provenance of a unit that :meth:`ensure` saw."""
        return self._known[unit].record

    def weights(self, units: Sequence[Unit]) -> HealedWeights:
        """All tensors of the units as a plan has them; no two survivors share a tensor."""
        self.ensure(units)
        stages: dict[Any, dict[str, torch.Tensor]] = {stage: {} for stage in STAGES}
        for unit in units:
            healed = self._read(unit) or next(iter(self._compute.heal([unit])))
            stages[unit.stage] |= healed.tensors
        return HealedWeights.of(stages)

    def add(self, healed: HealedUnit) -> None:
        """Add a trained unit from elsewhere."""
        self._compute.add_healed(healed)
        self._known[healed.unit] = _Known(healed.weights.digest, healed.record())

    def _name(self, unit: Unit) -> str:
        return unit_file(self.context, unit)

    def _read(self, unit: Unit) -> HealedUnit | None:
        name = self._name(unit)
        if not self._storage.exists(name):
            return None
        healed = _loads(unit, self._storage.read_bytes(name))
        if healed is None:
            logger.warning(
                "%s/%s: is damaged, the unit is trained again", self._storage.location, name
            )
        return healed


def _dumps(healed: HealedUnit) -> bytes:
    record = json.dumps({**healed.record(), "digest": healed.weights.digest})
    return save(dict(healed.tensors), metadata={"record": record})


def _loads(unit: Unit, content: bytes) -> HealedUnit | None:
    """Parse the bytes that :func:`_dumps` wrote; None if they are not whole."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        record = json.loads(header["__metadata__"]["record"])
        before, after = (float(record[f"relative_mse_{when}"]) for when in ("before", "after"))
        healed = HealedUnit(unit, load(content), before, after)
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None
    return healed if healed.weights.digest == record["digest"] else None


def units_of_plan(plan: PruningPlan) -> list[HealedUnit]:
    """The units of a healed plan with their tensors, for scoring variants of that plan.

    The provenance says which of two removed neighbours a survivor was trained for, and which states
    a fit reads; the plan runs in the same way without that record.

    Raises:
        PlanError: The healed tensors cannot be used.
    """
    recorded = {
        (r.get("stage"), r.get("kind", "pair"), r.get("block", r.get("survivor"))): r
        for r in plan.provenance.get("healed", ())
    }
    units = []
    for stage, tensors in HealedWeights.load(plan).stages.items():
        owned: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            block = int(name.split(".")[1])
            owned.setdefault((block, _kind(plan, stage, block, name)), {})[name] = tensor
        for (block, kind), own in sorted(owned.items()):
            record = recorded.get((stage, kind, block), {})
            losses = (float(record.get(f"relative_mse_{w}", "nan")) for w in ("before", "after"))
            unit = _unit(plan, stage, block, kind, record)
            units.append(HealedUnit(unit, own, *losses))
    return units


def _kind(plan: PruningPlan, stage: Stage, block: int, name: str) -> str:
    """The kind of unit that a tensor belongs to; only blocks that do not run have fits."""
    mode = plan.mode(stage, block)
    if mode.attends or mode.has_mlp:
        return "pair"
    return "bridge" if name.split(".")[2] == BRIDGE else "kv"


def _unit(
    plan: PruningPlan, stage: Stage, block: int, kind: str, record: Mapping[str, Any]
) -> Unit:
    """The unit of a block's tensors, as recorded or else as the modes tell."""
    if kind == "pair":
        before = plan.mode(stage, block - 1) if block else Mode.FULL
        removed = block + 1 if before == Mode.FULL else block - 1
        return Pair(stage, record.get("removed", removed), block)
    first = block
    while first and plan.mode(stage, first - 1) in (Mode.REMOVED, Mode.KV_ONLY):
        first -= 1
    stop = block + 1 if kind == "bridge" else block
    named = cast("FitKind", kind)
    return Fit(stage, named, record.get("first", first), record.get("stop", stop), block)
