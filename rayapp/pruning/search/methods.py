"""The search methods by name."""

from __future__ import annotations

from rayapp.pruning.search.annealing import Annealing
from rayapp.pruning.search.exhaustive import Exhaustive
from rayapp.pruning.search.similarity import Similarity

METHODS: dict[str, type[Annealing] | type[Exhaustive] | type[Similarity]] = {
    "annealing": Annealing,
    "exhaustive": Exhaustive,
    "similarity": Similarity,
}
"""Adding a method is one file and one line here; a method says whether it ``uses_influence``."""
