"""The page of a record: paragraphs, tables and drawings, in the order that a script gives them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from recorder.files import write_text
from recorder.origin import measured_on
from recorder.record import Record
from recorder.table import Table


@runtime_checkable
class Drawing(Protocol):
    """A picture of numbers; ``title`` says what it shows, for readers who cannot see it."""

    @property
    def title(self) -> str: ...

    def svg(self, salt: str) -> str: ...


Block = str | Table | Drawing
"""A paragraph or heading in Markdown, a table, or a drawing (one a page)."""


def page(blocks: Sequence[Block], record: Record, stem: str) -> str:
    """The Markdown of a record; its last line says what the numbers were measured on.

    If a record has parts of different origin, the script states the origin of every part.
    """
    parts = [_markdown(block, stem) for block in blocks]
    if "machine" in record:
        parts.append(measured_on(record))
    return "\n\n".join(parts) + "\n"


def write_page(home: Path, stem: str, blocks: Sequence[Block], record: Record) -> str:
    """Write a page and its drawing into ``home``; returns the Markdown."""
    for block in blocks:
        if isinstance(block, Drawing):
            write_text(home / f"{stem}.svg", block.svg(salt=stem))
    text = page(blocks, record, stem)
    write_text(home / f"{stem}.md", text)
    return text


def _markdown(block: Block, stem: str) -> str:
    if isinstance(block, Table):
        return block.markdown()
    if isinstance(block, Drawing):
        return f"![{block.title}]({stem}.svg)"
    return block
