"""Text that rayapp ships, written for it and free to use: a few pages of prose, and short prompts.

``prose.jsonl`` has lines for a perplexity, ``seeds.jsonl`` prompts without answers. A model answers
the prompts itself, so that its lines ask of a plan what the model would have said.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

PROSE_FILE = Path(__file__).parent / "prose.jsonl"
"""File of lines with ``text``, as ``rayapp evaluate`` takes them."""


@dataclass(frozen=True)
class Seed:
    """A prompt that a model answers itself, and its task."""

    prompt: str
    task: str

    @property
    def identity(self) -> str:
        """The text that decides the split: questions about one paragraph share it."""
        return self.prompt.partition("\n\n")[0]


def seeds() -> list[Seed]:
    """Return the shipped prompts, in the order of their file."""
    text = (Path(__file__).parent / "seeds.jsonl").read_text(encoding="utf-8")
    return [Seed(**json.loads(line)) for line in text.splitlines()]
