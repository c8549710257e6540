"""Rules by which a block's KV may be cut: what ``rayapp kv-select`` chooses from, block by block.

A rule is a function that gives the cuts it allows. How they travel (as they are, int8, int4) and
that a block may send everything is added to all of them (:mod:`rayapp.pruning.kv_choice.levels`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rayapp.plan import CountOrShare, KVTransfer

CutRule = Callable[[CountOrShare, Sequence[CountOrShare]], Iterable[KVTransfer]]
"""From the entries that ``--first`` and ``--last`` name to the cuts that a block may get."""


def first_and_last(first: CountOrShare, last: Sequence[CountOrShare]) -> list[KVTransfer]:
    """Keep attention sinks and a recent window of several lengths (arXiv:2309.17453)."""
    return [KVTransfer(first=first, last=length) for length in last]


CUT_RULES: dict[str, CutRule] = {"first_and_last": first_and_last}
"""Rules by name. Adding one is a function and one line here; a choice draws on all of them."""


def every_cut(first: CountOrShare, last: Sequence[CountOrShare]) -> list[KVTransfer]:
    """The cuts of all rules, rule after rule."""
    return [cut for rule in CUT_RULES.values() for cut in rule(first, last)]
