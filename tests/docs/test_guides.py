"""The guides hold: links lead somewhere, files and options exist, and commands run as shown."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest

from rayapp import cli
from rayapp.evaluation.paper.pictures import GREY
from tests.docs.guides import (
    GUIDES,
    PAGES,
    ROOMS,
    ROOT,
    anchors,
    blocks,
    commands,
    links,
    marked,
    named,
    spans,
    text_of,
)

FRONT = ROOT / "README.md"
MOST_BYTES, MOST_LINES, MOST_OUTPUT_LINES, MOST_ROWS = 10 * 1024, 150, 25, 6
SHOWN = [
    pytest.param(words, id=f"{named(guide)}:{' '.join(words[:3])}-{number}")
    for guide in GUIDES
    for number, words in enumerate(w for block in blocks(guide) for w in commands(block))
]
RUN = [guide for guide in GUIDES if marked(guide, "runs")]


def tables(page: Path) -> list[list[str]]:
    """The rows of every table of a page, heads left out."""
    found = re.findall(r"^(?:\|.*\n)+", text_of(page), re.MULTILINE)
    return [table.splitlines()[2:] for table in found]


def test_the_front_page_is_short():
    text = text_of(FRONT)
    assert len(text.encode()) <= MOST_BYTES
    assert len(text.splitlines()) <= MOST_LINES
    assert len(tables(FRONT)[0]) <= MOST_ROWS
    assert max(len(block.text.splitlines()) for block in blocks(FRONT)) <= MOST_OUTPUT_LINES
    assert sum(link.endswith(".svg") for link in links(FRONT)) == 1


def test_the_front_page_leads_to_every_guide():
    led_to = {(ROOT / link.partition("#")[0]).resolve() for link in links(FRONT)}
    assert {guide for guide in GUIDES if guide != FRONT} <= led_to


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("guide", GUIDES, ids=named)
def test_pictures_are_readable_in_light_and_dark(guide):
    for link in links(guide):
        if link.endswith(".svg"):
            picture = (guide.parent / link).resolve()
            style = picture.read_text(encoding="utf-8")
            assert ElementTree.fromstring(style).tag.endswith("svg")
            # A picture follows the reader's colours, brings a ground of its own, or has none and is
            # lettered in a grey that stands out from light and dark grounds alike.
            marks = ("prefers-color-scheme: dark", "fill: #ffffff", f"fill: {GREY}")
            assert any(mark in style for mark in marks), link


def named_files(text: str) -> list[str]:
    """What looks like a file or folder of the project, or a pattern of such."""
    return re.findall(rf"(?<![\w./-])((?:{'|'.join(ROOMS)})/[\w./*-]*)", text)


@pytest.mark.parametrize("guide", GUIDES, ids=named)
def test_named_files_exist(guide):
    texts = [*spans(guide), *(b.text for b in blocks(guide) if not b.is_example)]
    for name in (name for text in texts for name in named_files(text)):
        assert list(ROOT.glob(name.rstrip("/."))), name


@pytest.mark.parametrize("guide", GUIDES, ids=named)
def test_named_modules_exist(guide):
    for span in spans(guide):
        if re.fullmatch(r"rayapp(\.\w+)+(:\w+)?", span):
            parts = span.partition(":")[0].split(".")
            paths = [ROOT.joinpath(*parts), ROOT.joinpath(*parts[:-1])]
            assert any(p.is_dir() or p.with_suffix(".py").is_file() for p in paths), span


def parse(words: list[str]) -> None:
    """Read a command line as its program would; raises what the program would complain of."""
    program, *rest = words
    if program == "rayapp":
        _parse_command(rest[0], rest[1:])
    elif program == "python" and rest[0].startswith("jobs/"):
        _parse_command(Path(rest[0]).stem.replace("_", "-"), rest[1:])
    elif program == "python" and re.fullmatch(r"benchmarks/\w+\.py", rest[0]):
        made = runpy.run_path(str(ROOT / rest[0]), run_name="benchmark")["parser"]()
        made.parse_args([word for word in rest[1:] if word != "..."])


def _parse_command(name: str, words: list[str]) -> None:
    assert name in cli.COMMANDS, name
    command = cli.load(name)
    if isinstance(command, click.Group) or hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(name, list(words))


@pytest.mark.parametrize("words", SHOWN)
def test_shown_commands_parse(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    if words[:4] == ["ray", "job", "submit", "--working-dir"]:
        words = words[words.index("--") + 1 :]
    parse(words)


@pytest.mark.parametrize("guide", GUIDES, ids=named)
def test_options_in_prose_exist(guide):
    """Of ``rayapp X --option`` with its value or without, also where the rest is left out."""
    for span in spans(guide):
        found = re.match(r"rayapp ([a-z-]+)(.*)", span)
        if found is None or not re.search(r" --\w", found[2]):
            continue
        loaded = cli.load(found[1])
        leaves = getattr(loaded, "commands", {"": loaded}).values()
        known = {
            name for leaf in leaves for p in leaf.params for name in (*p.opts, *p.secondary_opts)
        }
        assert set(re.findall(r"(?<= )--[\w-]+", found[2])) <= known, span


@pytest.mark.ray
@pytest.mark.script
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("guide", RUN, ids=named)
def test_marked_commands_run(guide, clone):
    """Every block in its turn; a guide's blocks may use what its earlier ones left."""
    for block in marked(guide, "runs"):
        clone.run(block)
