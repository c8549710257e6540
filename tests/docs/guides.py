"""The guides as data: their links, headings, code and the options of commands in it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
ROOMS = ("benchmarks", "cluster", "jobs", "rayapp", "tests")
PAGES = sorted(
    [ROOT / "README.md", *(file for room in ROOMS for file in (ROOT / room).rglob("*.md"))]
)
"""Every Markdown file, the pages of results and the cards of models among them."""
GUIDES = [page for page in PAGES if not {"results", "testbed"} & set(page.parts)]
"""The files that people wrote for people."""

_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_MARKED = re.compile(r"^<!-- (\w+) -->\n```([^\n`]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_SPAN = re.compile(r"`([^`\n]+)`")


class Block(NamedTuple):
    """A fenced block: its language, and what else stands beside it, and its text."""

    language: str
    text: str

    @property
    def is_example(self) -> bool:
        """Whether it changes the code; tests/docs/test_worked_examples.py makes and runs those."""
        return self.language.endswith(" example")


def named(page: Path) -> str:
    """A page's name in the project."""
    return page.relative_to(ROOT).as_posix()


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    return [Block(*found) for found in _FENCE.findall(text_of(page))]


def marked(page: Path, mark: str) -> list[Block]:
    """The fenced blocks that follow ``<!-- mark -->``."""
    return [Block(*found[1:]) for found in _MARKED.findall(text_of(page)) if found[0] == mark]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", text_of(page))


def links(page: Path) -> list[str]:
    """Where the links and pictures of a page lead."""
    return _LINK.findall(prose(page))


def spans(page: Path) -> list[str]:
    """The code spans of a page's prose."""
    return _SPAN.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(block: Block) -> Iterator[list[str]]:
    """The command lines of a block in words; comments and assignments are left out."""
    if block.language not in ("", "sh"):
        return
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words.pop(0)
        if words:
            yield words
