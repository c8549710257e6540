"""Visual pruning in the report: accuracy against kept tokens, and pictures of what is kept."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rayapp.errors import DataError
from rayapp.evaluation.machine import this_machine
from rayapp.evaluation.report.findings import Findings, gather
from rayapp.evaluation.report.page import render_report
from rayapp.evaluation.report.visual_charts import accuracy_chart, sample_pictures
from rayapp.evaluation.result import DataFile
from rayapp.evaluation.visual.pictures import CELL, mask, views
from rayapp.evaluation.visual.result import (
    VISUAL_FILE,
    StageGain,
    View,
    VisualQuality,
    VisualRow,
    VisualSample,
    exact_match,
)
from rayapp.plan import VisualTokens
from rayapp.vision.layout import ImageLayout, PoolLayout

METHODS = ("trimtokenator", "random", "grid")
GROUPS = {"colour": [0, 2, 4], "count": [1, 3]}
DENSE = np.array([True, True, True, True, False])
FOUND = {
    ("trimtokenator", 64): np.array([True, True, True, False, False]),
    ("trimtokenator", 8): np.array([True, False, True, False, True]),
    ("random", 64): np.array([False, True, True, False, False]),
    ("random", 8): np.zeros(5, dtype=bool),
    ("grid", 64): DENSE,
    ("grid", 8): np.array([True, False, False, False, False]),
}
KEPT = {"trimtokenator": (0, 7, 23), "random": (5,), "grid": (0, 1, 2, 3)}
LINKS = re.compile(r'href="([^"]*)"')


def png(size: tuple[int, int], seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format="PNG")
    return buffer.getvalue()


def sample(number: int = 0, **changes: Any) -> VisualSample:
    photo = base64.b64encode(png((24, 16), number))
    fields = {
        "task": "colour",
        "question": f"colour of <b>{number}</b> ?",
        "answer": "red",
        "num_keep": 3,
        "is_match": {method: method != "random" for method in METHODS},
        "views": (View(photo=photo, rows=4, columns=6, kept=KEPT),),
    }
    return VisualSample(**fields | changes)


@pytest.fixture
def visual(plan) -> VisualQuality:
    rules = {key: VisualTokens(method=key[0], num_keep=key[1]) for key in FOUND}
    return VisualQuality(
        model=plan.model,
        dtype="float32",
        data=(DataFile(name="test.jsonl", sha256="ab" * 32, num_examples=5),),
        split="test",
        num_examples={task: len(group) for task, group in GROUPS.items()},
        num_visual_tokens=(576, 576),
        dense=exact_match(DENSE, GROUPS),
        rows=tuple(VisualRow.of(rules[key], FOUND[key], DENSE, GROUPS) for key in FOUND),
        samples=(sample(0), sample(1)),
        machine=this_machine(device="cpu", num_threads=1),
        wall_s=1.0,
        cpu_s=1.0,
    )


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._tag = tag
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self._tag in ("h2", "h3") and data.strip():
            self.headings.append(data)


def test_rows_count_tasks_alike_and_pair_with_the_dense_model(visual) -> None:
    row = visual.rows[0]
    assert row.exact_match == {"colour": pytest.approx(2 / 3), "count": 0.5}
    assert row.mean == pytest.approx(7 / 12)
    assert visual.dense == {"colour": pytest.approx(2 / 3), "count": 1.0}
    assert (row.lost["colour"].mean, row.lost["colour"].upper) == (0.0, 0.0)
    assert (row.lost["count"].mean, row.lost["count"].upper) == (50.0, 100.0)
    assert row.mean_lost.mean == 25.0
    both, one = FOUND["grid", 64], FOUND["random", 64]
    gain = StageGain.of(8, "alignment", both, one, GROUPS)
    assert gain.gain == pytest.approx((100 / 3 + 50) / 2)
    assert 0.0 <= gain.at_least < gain.gain


def test_the_file_reads_back(visual, tmp_path) -> None:
    path = visual.save(tmp_path / "a" / VISUAL_FILE)
    assert VisualQuality.parse(path.read_bytes(), "x") == visual
    assert visual.methods == METHODS
    assert visual.budgets == (8, 64)
    assert "3 questions" not in visual.caveats[0]
    assert "2 questions in the smallest task" in visual.caveats[0]


def test_the_page_shows_accuracy_and_pictures(visual, plan) -> None:
    text = render_report(Findings(plan, visual=visual))
    page = Page(text)
    assert {"Visual tokens", "Which tokens are kept"} <= set(page.headings)
    lines = [a for tag, a in page.seen if tag == "polyline" and "trend" in (a["class"] or "")]
    assert [len((line["points"] or "").split()) for line in lines] == [2, 2, 2]
    for shown in (
        "5 questions about images",
        "the dense model sees 576",
        "trimtokenator, 64 kept: 58.3%, at most",
        "dense: 83.3 %",
        "random: wrong",
        "grid: right",
        "2 questions in the smallest task",
    ):
        assert shown in text, shown
    assert "<b>0" not in text
    assert "&lt;b&gt;0&lt;/b&gt;" in text
    without = render_report(Findings(plan))
    assert "Visual tokens" not in without
    assert "href" not in without


def test_coordinates_lie_inside(visual, plan) -> None:
    wide = tall = 0.0
    for tag, attributes in Page(render_report(Findings(plan, visual=visual))).seen:
        if "viewbox" in attributes:
            wide, tall = map(float, (attributes["viewbox"] or "").split()[2:])
        names = (("cx", wide), ("cy", tall), ("x1", wide), ("y1", tall))
        for name, limit in names:
            if name in attributes:
                assert 0 <= float(attributes[name] or "nan") <= limit, (tag, name)
        for pair in (attributes.get("points") or "").split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= wide
            assert 0 <= y <= tall


def test_the_plans_own_method_stands_out(visual, plan) -> None:
    own = plan.model_copy(update={"visual_tokens": VisualTokens(method="grid", num_keep=64)})
    chart = accuracy_chart(visual, own)
    special = {s.name: [mark.is_special for mark in s.marks] for s in chart.plot.series}
    assert special == {"trimtokenator": [False] * 2, "random": [False] * 2, "grid": [True] * 2}
    grid = chart.plot.series[2].marks
    assert grid[0].x < grid[1].x  # more tokens to the right
    assert grid[0].y > grid[1].y  # and more right answers above
    assert grid[1].y == pytest.approx(chart.plot.lines[0][0])  # as good as dense
    assert "This plan keeps 64 per image by grid" in render_report(Findings(own, visual=visual))


def test_pictures_are_embedded_once_and_stay_small(visual, plan) -> None:
    text = render_report(Findings(plan, visual=visual))
    links = LINKS.findall(text)
    assert all(link.startswith(("data:image/png;base64,", "#photo-")) for link in links)
    urls = [link for link in links if link.startswith("data:")]
    assert len(urls) == len(visual.samples) * (1 + len(METHODS))
    names = {a["id"] for tag, a in Page(text).seen if tag == "image" and "id" in a}
    assert {link[1:] for link in links if link.startswith("#")} == names
    assert len(names) == 2
    for url in urls:
        Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).load()
    assert "prefers-color-scheme: dark" in text
    large = base64.b64encode(png((96, 96)))
    kept = {f"method-{n}": tuple(range(n, 576, 9)) for n in range(11)}
    view = View(photo=large, rows=24, columns=24, kept=kept)
    one = sample(views=(view,), is_match=dict.fromkeys(kept, True))
    many = visual.model_copy(update={"samples": (one,) * 3})
    grown = len(render_report(Findings(plan, visual=many))) - len(text)
    assert grown < 3 * (len(large) + 11 * 2_000)


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (24, 24), (1, 1)])
def test_masks_show_what_is_kept(rows: int, columns: int) -> None:
    kept = list(range(0, rows * columns, 3))
    found = mask(rows, columns, kept)
    assert len(found) < 2_000
    picture = Image.open(io.BytesIO(found)).convert("RGBA")
    assert picture.size == (columns * CELL, rows * CELL)
    for token in range(rows * columns):
        x, y = (token % columns) * CELL, (token // columns) * CELL
        middle, corner = picture.getpixel((x + CELL // 2, y + CELL // 2)), picture.getpixel((x, y))
        if token in kept:
            assert (middle[3], corner[3]) == (0, 255)
            assert min(corner[:2]) > 150  # bright
        else:
            assert middle == corner
            assert 150 < middle[3] < 255
            assert max(middle[:3]) < 50  # dark


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_views_lie_over_what_their_grid_shows(kind: str, processor: Callable[[str], Any]) -> None:
    image = Image.open(io.BytesIO(png((40, 16), 3))).convert("RGB")
    pools = [PoolLayout(0, 4, 4)]
    if kind == "llava_next":
        pools.append(PoolLayout(16, 4, 8, has_newlines=True))
    kept = {"a": torch.tensor([0, 5, 15]), "b": torch.tensor([1, 16, 24, 25, 33, 34])}
    if kind == "llava":
        kept["b"] = torch.tensor([1])
    found = views(processor(kind), image, ImageLayout(tuple(pools)), kept)
    assert found[0].kept == {"a": (0, 5, 15), "b": (1,)}
    seen = Image.open(io.BytesIO(found[0].photo)).convert("RGB")
    assert seen.size == (16, 16)
    pixels = processor(kind)(images=[image], return_tensors="pt", do_normalize=False)
    first = pixels["pixel_values"].reshape(-1, 3, 16, 16)[0]
    assert np.abs(np.asarray(seen) / 255 - first.permute(1, 2, 0).numpy()).max() < 1 / 255
    if kind == "llava_next":  # places 24 and 33 are the newlines of its first two rows
        assert found[1].kept == {"a": (), "b": (0, 8, 16)}
        whole = Image.open(io.BytesIO(found[1].photo)).convert("RGB")
        assert np.array_equal(np.asarray(whole), np.asarray(image))


def test_large_photos_are_made_smaller(processor: Callable[[str], Any]) -> None:
    image = Image.open(io.BytesIO(png((1_000, 400)))).convert("RGB")
    pools = (PoolLayout(0, 4, 4), PoolLayout(16, 4, 8, has_newlines=True))
    found = views(processor("llava_next"), image, ImageLayout(pools), {})
    assert Image.open(io.BytesIO(found[1].photo)).size == (336, 134)


def test_gathering_takes_what_is_of_the_plans_model(visual, blocks_plan, tmp_path) -> None:
    home = blocks_plan.save(tmp_path / "plan").parent
    assert gather(home).visual is None
    visual.save(home / VISUAL_FILE)
    assert gather(home).visual == visual
    assert "Which tokens are kept" in render_report(gather(home))
    other = visual.model.model_copy(update={"weights_fingerprint": "0" * 8})
    visual.model_copy(update={"model": other}).save(home / VISUAL_FILE)
    found = gather(home)
    assert found.visual is None
    assert found.left_out == (f"{VISUAL_FILE}: is of another model",)
    (home / VISUAL_FILE).write_text("{}")
    with pytest.raises(DataError, match=r"visual_quality.json: is no comparison of visual pruning"):
        gather(home)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"photo": base64.b64encode(b"<svg onload=x>").decode()}, "a photo is no PNG"),
        ({"photo": '"><script>'}, "photo"),
        ({"kept": {"grid": [24]}}, "token 24 does not lie in 4 x 6"),
        ({"rows": 100_000}, "rows"),
    ],
)
def test_hostile_pictures_are_refused(visual, change, message) -> None:
    content = json.loads(visual.model_dump_json())
    content["samples"][0]["views"][0].update(change)
    with pytest.raises(DataError, match=message):
        VisualQuality.parse(json.dumps(content).encode(), VISUAL_FILE)


def test_a_sample_without_a_methods_tokens_has_no_picture_of_it(visual) -> None:
    photo = base64.b64encode(png((8, 8)))
    bare = sample(views=(View(photo=photo, rows=2, columns=2, kept={"grid": (0,)}),))
    (picture,) = sample_pictures(visual.model_copy(update={"samples": (bare,)}))
    assert [len(method.masks) for method in picture.methods] == [0, 0, 1]


def test_bytes_of_a_plan_with_images_count_what_visual_pruning_saved(plan, evaluation) -> None:
    mean = evaluation.mean
    pruned = mean.model_copy(update={"saved_by_visual_tokens_bytes": mean.bytes_full * 3 // 4})
    text = render_report(Findings(plan, evaluation.model_copy(update={"mean": pruned})))
    assert "What travels of a prompt of 50 tokens (those left of 200 after visual pruning)" in text
    assert "One prompt of 200 tokens (150 of them visual tokens that are not kept)" in text
    entry = 2 * 2 * 16 * 2  # keys and values, heads, dimension, bytes
    assert f"saved by visual tokens: {150 * 6 * entry:,} bytes" in text
    assert "saved by visual pruning" in text
    plain = render_report(Findings(plan, evaluation))
    assert "visual" not in plain
