"""Demand for nodes that a cluster does not have yet, as its autoscaler sees it.

A cluster that was scaled to zero has no node that could hold a replica, and starts none before
something waits for one. A pending placement group is such a demand: unlike a request to the
autoscaler it replaces nobody else's, and it ends with the process that made it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from ray.util.placement_group import placement_group, remove_placement_group


@dataclass(frozen=True)
class Bundle:
    """What one replica needs, and the labels of the node that it needs it on."""

    num_cpus: float
    num_gpus: float
    labels: Mapping[str, str]

    @property
    def resources(self) -> dict[str, float]:
        """The resources as Ray names them; a bundle must have some."""
        named = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        return {name: amount for name, amount in named.items() if amount} or {"CPU": 0.001}


class Demand:
    """Demand for all bundles together, while it is shown and nothing holds them yet.

    Once there are nodes for all, the bundles are given back at once: whoever wanted the nodes finds
    them idle. As a context, it shows nothing any more when it ends.

    Args:
        bundles: What is needed.
    """

    def __init__(self, bundles: Sequence[Bundle]) -> None:
        self._bundles = bundles
        self._group: Any = None

    def show(self) -> None:
        """Show the demand, if it is not shown already."""
        if self._group is None:
            self._group = placement_group(
                [bundle.resources for bundle in self._bundles],
                bundle_label_selector=[dict(bundle.labels) for bundle in self._bundles],
            )

    def settle(self) -> None:
        """Give the bundles back if there are nodes for all of them."""
        if self._group is not None and self._group.wait(0):
            self._remove()

    def _remove(self) -> None:
        remove_placement_group(self._group)
        self._group = None

    def __enter__(self) -> Demand:
        return self

    def __exit__(
        self,
        error: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._group is not None:
            self._remove()
