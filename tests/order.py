"""The order of tests: those that need the shared cluster last, those that share a service together.

The order saves updates of the shared service, and no test depends on it but in one respect: before
the cluster's first test this process is connected to no cluster, which others rely on.
"""

from __future__ import annotations

import pytest

SLOW_S = 900
"""Seconds that a slow test may take where it says nothing else: three processes share the CPUs."""

SHARED = (
    *("cluster", "evaluators", "deploy", "one_of_each"),
    *("planned", "unified", "elastic", "standard"),
)


def place(item: pytest.Item) -> int:
    """The last thing of :data:`SHARED` that a test needs, by itself or as a parameter."""
    names = {*getattr(item, "fixturenames", ())}
    if hasattr(item, "callspec"):
        names |= {value for value in item.callspec.params.values() if isinstance(value, str)}
    return max((n for n, shared in enumerate(SHARED, 1) if shared in names), default=0)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by their place; those of one place stay in order. Slow ones get time."""
    items.sort(key=place)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_S))
