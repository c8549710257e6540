"""All that a search is told, for tests that change one value of it at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayapp.pruning.kv_choice.settings import KVSelectSettings
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.search import SearchSettings
from rayapp.settings import Settings, filled


def _changed(kinds: tuple[Settings, ...], changes: dict[str, Any]) -> list[Any]:
    values = {name: value for settings in kinds for name, value in settings}
    return filled({**values, **changes}, *(type(settings) for settings in kinds))


@dataclass(frozen=True)
class Told:
    """What is scored, where, and how it is searched: ``prune(*told)``."""

    score: ScoreSettings
    compute: ComputeSettings
    search: SearchSettings

    @classmethod
    def of(cls, **values: Any) -> Told:
        return cls(*filled(values, ScoreSettings, ComputeSettings, SearchSettings))

    @classmethod
    def parse(cls, text: str) -> Told:
        """What :meth:`dumps` wrote, for another process."""
        return cls.of(**json.loads(text))

    def dumps(self) -> str:
        values = {name: v for each in self for name, v in each.model_dump(mode="json").items()}
        return json.dumps(values)

    def but(self, **changes: Any) -> Told:
        return Told(*_changed((*self,), changes))

    @property
    def out(self) -> Path:
        return Path(self.search.out)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.score, self.compute, self.search))


@dataclass(frozen=True)
class KVTold:
    """What is scored, where, and what is chosen: ``kv_select(*told)``."""

    score: ScoreSettings
    compute: ComputeSettings
    choice: KVSelectSettings

    @classmethod
    def of(cls, **values: Any) -> KVTold:
        return cls(*filled(values, ScoreSettings, ComputeSettings, KVSelectSettings))

    def but(self, **changes: Any) -> KVTold:
        """With these changes; a goal takes the place of the one before."""
        goals = {"target_reduction": None, "max_kl": None, "threshold": None}
        given = goals if goals.keys() & changes.keys() else {}
        return KVTold(*_changed((*self,), {**given, **changes}))

    @property
    def out(self) -> Path:
        return Path(self.choice.out or self.choice.plan)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.score, self.compute, self.choice))
