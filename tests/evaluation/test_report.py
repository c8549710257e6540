"""The HTML report: complete, self-contained, escaped; and the tables beside it."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from rayapp.errors import DataError
from rayapp.evaluation.bootstrap import Bound
from rayapp.evaluation.charts import byte_shares, removal_map, search_trace, transfer_strips
from rayapp.evaluation.machine import this_machine
from rayapp.evaluation.progress import shown_progress
from rayapp.evaluation.report import write_report
from rayapp.evaluation.result import (
    DataFile,
    EvaluationResult,
    LatencyResult,
    PlanSummary,
    StageTimes,
    TaskResult,
)
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.evaluation.table import markdown, tables
from rayapp.plan import KVTransfer, Mode, ModelSignature, PruningPlan, StagePlan

MODEL = ModelSignature(
    model_type="llama",
    num_blocks=6,
    hidden_size=48,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=300,
    weights_fingerprint="feedc0de",
)
PLAN = PruningPlan(
    model=MODEL,
    prefill=StagePlan(
        blocks={
            1: Mode.KV_ONLY,
            2: Mode.MLP_AND_KV,
            3: Mode.REMOVED,
            4: Mode.MLP_ONLY,
            5: Mode.ATTENTION_ONLY,
        }
    ),
    decode=StagePlan(blocks={3: Mode.REMOVED, 4: Mode.MLP_ONLY}),
    kv_transfer={0: KVTransfer(first=4, last=16), 1: KVTransfer(encoding="int4")},
    provenance={"method": "<script>alert(1)</script>", "scores": {"kl": 0.0123}},
)
VOID = {"meta", "rect", "line", "circle", "polyline", "link", "br", "img"}


def row(task: str, **changes: object) -> TaskResult:
    fields = {
        "task": task,
        "num_examples": 40,
        "num_tokens": 200,
        "min_prompt_tokens": 100,
        "mean_prompt_tokens": 200.0,
        "max_prompt_tokens": 300,
        "dense_nll": 0.01,
        "plan_nll": 0.02345,
        "kl": Bound(mean=0.0312, upper=0.04, num_examples=40),
        "dense_exact_match": 1.0,
        "plan_exact_match": 0.95,
        "points_lost": Bound(mean=5.0, upper=11.25, num_examples=40),
        "bytes_full": 8_000_000,
        "bytes_sent": 2_000_000,
        "overhead_bytes": 40_000,
    }
    return TaskResult.model_validate(fields | changes)


@pytest.fixture
def evaluation() -> EvaluationResult:
    return EvaluationResult(
        complete=True,
        model=MODEL,
        dtype="bfloat16",
        plan=PlanSummary(
            fingerprint=PLAN.fingerprint, is_empty=False, prefill_removed=3.0, decode_removed=1.5
        ),
        settings=EvaluationSettings(split="validation"),
        data=(DataFile(name="validation.jsonl", sha256="ab" * 32, num_examples=80),),
        tasks=(row("copy"), row("so|rt", min_prompt_tokens=130)),
        mean=row("mean", num_examples=80),
        latency=(
            LatencyResult(
                num_prompt_tokens=128,
                num_answer_tokens=64,
                batch_size=8,
                num_runs=30,
                num_threads=1,
                dense=StageTimes(prefill_ms=20, tpot_ms=10, answer_ms=650),
                plan=StageTimes(prefill_ms=10, tpot_ms=8, answer_ms=520),
            ),
        ),
        machine=this_machine(device="cpu", num_threads=1),
    )


class Balance(HTMLParser):
    """Fails on a tag that is closed in the wrong place; collects tags with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def parsed(text: str) -> Balance:
    page = Balance()
    page.feed(text)
    assert page.open == []
    return page


LEDGER = {
    "totals": {
        "num_transfers": 12,
        "bytes_full": 10_000,
        "bytes_sent": 4_100,
        "overhead_bytes": 100,
        "saved_by_visual_tokens_bytes": 0,
        "saved_by_blocks_bytes": 2_000,
        "saved_by_tokens_bytes": 3_000,
        "saved_by_encoding_bytes": 1_000,
    },
    "links": [],
    "recent": [],
}


def test_every_block_and_stage_is_shown(tmp_path, evaluation):
    trials = [0.5, 0.4, float("inf"), 0.3]
    text = write_report(tmp_path / "new" / "r.html", PLAN, evaluation, trials, LEDGER).read_text()
    cells = {
        (a["data-stage"], int(a["data-block"])): a["data-mode"]
        for tag, a in parsed(text).seen
        if tag == "g" and "data-mode" in a
    }
    assert cells == {
        (stage, block): PLAN.mode(stage, block).value
        for stage in ("prefill", "decode")
        for block in range(6)
    }
    sent = {
        int(a["data-block"]): a["data-transfer"]
        for tag, a in parsed(text).seen
        if "data-transfer" in a
    }
    assert sent[0] == "first 4, last 16 of 200"
    assert sent[1] == "all 200, int4"
    assert sent[3] == sent[4] == "not sent: decode does not attend"


def test_the_report_refers_to_nothing_outside(tmp_path, evaluation):
    text = write_report(tmp_path / "r.html", PLAN, evaluation, [1.0], LEDGER).read_text()
    page = parsed(text)
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.seen}
    assert not {"src", "href"} & {name for _, attributes in page.seen for name in attributes}
    assert "&lt;script&gt;" in text  # provenance is text, whatever it holds


def test_numbers_and_caveats_are_on_the_page(tmp_path, evaluation):
    text = write_report(tmp_path / "r.html", PLAN, evaluation, [0.9, 0.25], LEDGER).read_text()
    for expected in ("0.0312", "+11.25", "4.00x", "1.25x", "0.25 after 2 evaluations", "2.44x"):
        assert expected in text
    assert "40 examples in the smallest task" in text
    assert "the shortest prompt has 100 tokens" in text
    assert "prefers-color-scheme: dark" in text


def test_a_report_of_a_plan_alone(tmp_path):
    text = write_report(tmp_path / "r.html", PLAN).read_text()
    assert "Removal map" in text
    assert "The search" not in text
    assert "Transfers" not in text
    empty = write_report(tmp_path / "e.html", PruningPlan()).read_text()
    parsed(empty)
    assert "The dense model" in empty


def test_trials_are_read_from_parquet(tmp_path):
    dense, size = (0.0, 0.0), (PLAN.removed("prefill"), PLAN.removed("decode"))
    removed = [dense, size, size, (1.0, 0.0), size]
    columns = {
        "prefill_removed": [prefill for prefill, _ in removed],
        "decode_removed": [decode for _, decode in removed],
        "score": [0.0, 3.0, 1.0, 0.5, 2.0],
    }
    pq.write_table(pa.table(columns), tmp_path / "trials.parquet")
    text = write_report(tmp_path / "r.html", PLAN, trials=tmp_path / "trials.parquet").read_text()
    assert "1 after 3 evaluations" in text
    pq.write_table(pa.table({"other": [3.0]}), tmp_path / "wrong.parquet")
    for name in ("wrong.parquet", "missing.parquet"):
        with pytest.raises(DataError, match=name):
            write_report(tmp_path / "r.html", PLAN, trials=tmp_path / name)


def test_the_trace_is_a_staircase_of_the_best_score():
    trace = search_trace([4.0, 6.0, 2.0, 3.0, 2.0])
    assert trace.best == ((0.0, 0.5), (0.5, 0.5), (0.5, 1.0), (1.0, 1.0))
    assert trace.dots == ((0.0, 0.5), (0.25, 0.0), (0.5, 1.0), (0.75, 0.75), (1.0, 1.0))
    assert (trace.best_score, trace.is_log) == (2.0, False)
    assert search_trace([1e-4, 1.0]).is_log
    assert search_trace([float("inf"), float("nan")]) is None
    assert search_trace([]) is None
    assert len(search_trace([1.0] * 10_000).dots) <= 1_000


def test_kv_is_handed_over_where_decode_attends():
    cells = removal_map(PLAN, 6)
    assert [cell.hands_over for cell in cells["prefill"]] == [True, True, True, False, False, True]
    assert not any(cell.hands_over for cell in cells["decode"])


def test_strips_are_shares_of_the_prompt():
    strips = transfer_strips(PLAN, 6, 40)
    assert (strips[0].first, strips[0].last) == (0.1, 0.4)
    assert (strips[2].first, strips[2].last) == (1.0, 0.0)
    assert (strips[3].first, strips[3].last) == (0.0, 0.0)


def test_byte_shares_cover_the_bar():
    shares = byte_shares(LEDGER["totals"])
    assert [share.name for share in shares] == [
        "sent",
        "saved by blocks",
        "saved by tokens",
        "saved by encoding",
    ]
    assert shares[-1].start + shares[-1].width == pytest.approx(1.0)
    assert byte_shares({"bytes_sent": 0}) == []


def test_markdown_tables(evaluation):
    text = markdown(evaluation)
    assert "| copy | 40 | 0.0100 | 0.0234 | 0.0312 | 100.0% | 95.0% | +5.00 | +11.25 |" in text
    assert "| so\\|rt | 130-300 | 200,000 | 50,000 | 1,000 | 4.00x |" in text
    assert "| speed-up |  | 2.00x | 1.25x | 1.25x |" in text
    for table in tables(evaluation):
        assert all(len(cells) == len(table.columns) for cells in table.rows)


def test_tables_fit_a_terminal_of_80_columns(evaluation):
    for table in tables(evaluation):
        console = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
        console.print(table.rich())
        text = console.file.getvalue()
        assert "…" not in text
        assert all(len(line) <= 80 for line in text.splitlines())


def test_a_claim_has_no_caveats(evaluation):
    claim = evaluation.model_copy(
        update={"tasks": (row("copy", num_examples=2_000, min_prompt_tokens=128),)}
    )
    assert claim.caveats == ()
    assert len(claim.model_copy(update={"dtype": "float32"}).caveats) == 1


def test_progress_in_a_log_is_lines_and_on_a_terminal_bars():
    log = io.StringIO()
    with shown_progress(Console(file=log, width=80)) as progress:
        for done in range(1, 101):
            progress("copy: likelihood", done, 100)
    assert log.getvalue().splitlines() == ["copy: likelihood: 1/100", "copy: likelihood: 100/100"]
    terminal = io.StringIO()
    with shown_progress(Console(file=terminal, width=80, force_terminal=True)) as progress:
        progress("copy: likelihood", 3, 3)
    assert re.search(r"copy: likelihood.*3/3", terminal.getvalue())
