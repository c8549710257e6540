"""Numbers as the paper's tables: Markdown for people, CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from rayapp.evaluation.cells import Table
from rayapp.evaluation.machine import Machine
from rayapp.evaluation.measures.margins import LEAST_SHARE
from rayapp.evaluation.paper.marks import quality_speed
from rayapp.evaluation.paper.numbers import (
    ACCURACY,
    ALL_DATA,
    ANSWER,
    BY_DECODE,
    BYTES,
    MARGIN,
    TPOT,
    TTFT,
    WITH_TRANSFER,
    Number,
    beside_ours,
    decode_shares,
    row_numbers,
)
from rayapp.evaluation.paper.outcome import RowOutcome
from rayapp.evaluation.paper.pictures import BlockMap, QualitySpeed
from rayapp.evaluation.paper.rows import DENSE, Row
from rayapp.evaluation.paper.settings import ReproduceSettings
from rayapp.evaluation.result import MEAN
from rayapp.plan import STAGES
from rayapp.pruning.search.sensitivity import Sensitivity


@dataclass(frozen=True)
class Paper:
    """All the material of the tables.

    Attributes:
        settings: The settings of the reproduction.
        rows: The outcomes of the rows, in the order of the tables.
        wanted: The rows that they are the outcomes of, and those still to come.
        left_out: Names of missing rows, with the reason.
        machine: The machine that measured.
        notes: Definitions of the numbers.
        caveats: Reasons why some numbers must not be quoted.
        maps: The cost of every block alone, on several calibration sets.
    """

    settings: ReproduceSettings
    rows: Sequence[RowOutcome]
    wanted: Sequence[Row]
    left_out: Mapping[str, str]
    machine: Machine
    notes: Sequence[str]
    caveats: Sequence[str]
    maps: Sequence[Sensitivity] = ()

    @cached_property
    def row_of(self) -> dict[str, Row]:
        """The wanted rows by name."""
        return {row.name: row for row in self.wanted}

    def title(self, name: str) -> str:
        """The title of a row."""
        return self.row_of[name].title

    @cached_property
    def numbers(self) -> dict[str, list[Number]]:
        """The numbers by row."""
        seed, link = self.settings.seed, self.settings.link_gbps
        return {row.name: row_numbers(row, link_gbps=link, seed=seed) for row in self.rows}

    def number(self, row: str, data: str, metric: str) -> Number | None:
        """One number of a row; None if the row has none of this name."""
        matching = (n for n in self.numbers[row] if (n.data, n.metric) == (data, metric))
        return next(matching, None)

    def write(self, directory: Path) -> None:
        """Write ``paper.md``, ``paper.csv``, ``paper.json``, and the pictures."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, picture in self.pictures().items():
            (directory / name).write_text(picture.svg(salt=name), encoding="utf-8")
        (directory / "paper.md").write_text(self.markdown(), encoding="utf-8")
        (directory / "paper.csv").write_text(self.csv(), encoding="utf-8")
        (directory / "paper.json").write_text(self.json(), encoding="utf-8")

    def markdown(self) -> str:
        """Tables, definitions, and the reasons against quoting them, as Markdown."""
        parts = [f"![{picture.title}]({name})" for name, picture in self.pictures().items()]
        parts += [table.markdown() for table in self.tables()]
        lines = [f"- {note}" for note in self.notes]
        lines += [f"- left out, {self.title(name)}: {why}" for name, why in self.left_out.items()]
        lines += [f"- not for quotation: {caveat}" for caveat in self.caveats]
        return "\n\n".join([*parts, "\n".join(lines)]) + "\n"

    def pictures(self) -> dict[str, BlockMap | QualitySpeed]:
        """The pictures by file name: the map of blocks, and quality against speed."""
        drawn: dict[str, BlockMap | QualitySpeed] = {}
        singles = [one.singles for one in self.maps if one.singles]
        if singles:
            title = "KL of every block taken away alone, prefill above decode"
            stages = ([one.stage(stage) for one in singles] for stage in STAGES)
            drawn["blocks.svg"] = BlockMap(title, *stages)
        picture = quality_speed(self.record()["rows"])
        if picture.marks and self.settings.preset == "paper":
            drawn["quality.svg"] = picture
        return drawn

    def csv(self) -> str:
        """The numbers as CSV, one per line."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["row", "title", *(field.name for field in fields(Number))])
        for row, numbers in self.numbers.items():
            for number in numbers:
                writer.writerow([row, self.title(row), *asdict(number).values()])
        return text.getvalue()

    def json(self) -> str:
        """The record as JSON."""
        return json.dumps(self.record(), indent=2) + "\n"

    def record(self) -> dict[str, Any]:
        """Everything except the outcomes per example, which lie beside the plans; plain data."""
        rows = [
            {
                **row.model_dump(mode="json", exclude={"data", "latency"}),
                "title": self.title(row.name),
                "source": self.row_of[row.name].source,
                "healed": self.row_of[row.name].healed,
                "numbers": [asdict(number) for number in self.numbers[row.name]],
            }
            for row in self.rows
        ]
        return {
            "settings": self.settings.model_dump(mode="json"),
            "machine": self.machine.model_dump(mode="json"),
            "rows": rows,
            "left_out": dict(self.left_out),
            "maps": [one.model_dump(mode="json") for one in self.maps],
            "notes": list(self.notes),
            "caveats": list(self.caveats),
        }

    def tables(self) -> list[Table]:
        """The non-empty tables: quality, ours beside the peers, speed, bytes and searches."""
        tables = [
            self._quality(),
            self._beside_ours(),
            self._speed(),
            self._bytes(),
            self._search(),
        ]
        return [table for table in tables if table.rows and len(table.columns) > 1]

    def _quality(self) -> Table:
        dense = self.numbers[self.rows[0].name]
        kept = [
            n
            for n in dense
            if n.data != ALL_DATA and not n.data.startswith("batch ") and n.metric != BY_DECODE
        ]
        heads = [f"{n.data} {n.metric} (n={n.num:,})" for n in kept]
        shares = [n.data for n in dense if n.metric == BY_DECODE]
        told = [f"{BY_DECODE}, % ({', '.join(shares)})"] if shares else []
        rows = []
        for row in self.rows:
            cells = [self._lost(row.name, n.data, n.metric) for n in kept]
            decoded = [decode_shares(self.numbers[row.name])] if shares else []
            rows.append((self.title(row.name), _removed(row), *decoded, *cells))
        return Table(
            "Quality (lost against dense, at most so much with 95 %)",
            ("row", "blocks removed, prefill and decode", *told, *heads),
            tuple(rows),
        )

    def _lost(self, row: str, data: str, metric: str) -> str:
        number = self.number(row, data, metric)
        if number is None:
            return "-"
        if row == DENSE.name:
            return f"{number.plan:.2f}"
        if metric == MARGIN:
            return f"{number.plan:.1f} % (≥ {100 - (number.bound or 0):.1f} %)"
        return f"{number.plan:.2f} (lost {number.difference:.3g}, ≤ {number.bound:.3g})"

    def _beside_ours(self) -> Table:
        rows = []
        by_name = {row.name: row for row in self.rows}
        for name, peer in by_name.items():
            ours = by_name.get(self.row_of[name].beside)
            number = ours and beside_ours(peer, ours, seed=self.settings.seed)
            if ours and number:
                points = (f"{number.difference:z.2f}", f"{number.bound:z.2f}")
                removed = (_removed(peer), f"{self.title(ours.name)} ({_removed(ours)})")
                rows.append((self.title(name), *removed, f"{number.num:,}", *points))
        columns = (
            *("peer", "blocks removed", "beside", "n"),
            *("points that it loses more", "at least (95 %)"),
        )
        return Table("Peers beside ours: mean accuracy, paired", columns, tuple(rows))

    def _speed(self) -> Table:
        batches = [f"batch {timing.batch_size}" for timing in self.rows[0].latency]
        link = f"with transfer at {self.settings.link_gbps:g} Gb/s, batch 1"
        rows = []
        for row in self.rows:
            times = [self._ratio(row.name, b, m) for b in batches for m in (TTFT, TPOT, ANSWER)]
            reckoned = self._ratio(row.name, "batch 1", WITH_TRANSFER)
            rows.append((self.title(row.name), *times, reckoned))
        heads = [f"{m}, {b}" for b in batches for m in (TTFT, TPOT, ANSWER)]
        timing = self.rows[0].latency[0] if self.rows[0].latency else None
        what = "Speed"
        if timing:
            what += (
                f" ({timing.num_prompt_tokens} in, {timing.num_answer_tokens} out, median of "
                f"{timing.num_runs} interleaved runs, threads: {timing.num_threads}; speed-up, at "
                "least so much with 95 %)"
            )
        return Table(what, ("row", *heads, link), tuple(rows) if timing else ())

    def _ratio(self, row: str, data: str, metric: str) -> str:
        number = self.number(row, data, metric)
        if number is None:
            return "-"
        at_least = "" if number.bound is None else f", ≥ {number.bound:.3f}"
        return f"{number.plan:.2f} ({number.difference:.3f}x{at_least})"

    def _bytes(self) -> Table:
        columns = (
            "row",
            "requests",
            "KV bytes sent per request",
            "reduction",
            "weights of a prefill replica",
            "of a decode replica",
            "of a unified replica",
        )
        rows = tuple((self.title(row.name), *self._bytes_cells(row)) for row in self.rows)
        return Table("Bytes", columns, rows)

    def _bytes_cells(self, row: RowOutcome) -> tuple[str, ...]:
        number = self.number(row.name, ALL_DATA, BYTES)
        sent = ("-", "nothing is sent", "-")
        if number is not None:
            sent = (f"{number.num:,}", f"{number.plan:,.0f}", f"{number.difference:.3f}x")
        if row.weights is None:
            return (*sent, "-", "-", "-")
        replicas = (row.weights.prefill, row.weights.decode, row.weights.unified)
        shown = [f"{num_bytes / 1e6:,.1f} MB" for num_bytes in replicas]
        return (*sent, *(["-", "-", shown[2]] if row.base else shown))

    def _search(self) -> Table:
        rows = tuple(
            (
                self.title(row.name),
                self.row_of[row.name].source,
                f"{row.search.evaluations:,}",
                f"{row.search.seconds:,.0f}",
                f"{row.search.score:.4g}",
                row.plan,
            )
            for row in self.rows
            if row.search
        )
        columns = ("row", "method of", "evaluations", "seconds", "KL on calibration", "plan")
        return Table("Searches", columns, rows)


def _removed(row: RowOutcome) -> str:
    return f"{row.prefill_removed:g} and {row.decode_removed:g}"


def definitions(
    settings: ReproduceSettings, rows: Sequence[Row], bases: Mapping[str, str]
) -> list[str]:
    """Definitions of the numbers; ``bases`` says on which row's plan another one rests."""
    notes = [
        "acc: the right choice has the highest summed log-likelihood; acc_norm: the highest per "
        "character (as lm-evaluation-harness); shots are those of the prompts in the files; exact "
        "match: greedy decoding gives the whole completion",
        "a data set's tasks count by their examples; the mean counts data sets with an accuracy "
        "alike, by acc or exact match",
        "perplexity: prompt part through prefill, rest teacher-forced through decode; lost is NLL "
        "in nats per token; not comparable with another paper's windows",
        "answer: greedy decoding begins with the completion, whatever follows",
        "margin kept: share of dense's margin above chance that the plan keeps, in sets where "
        "dense is surely above chance and above the commonest answer; their mean leaves out "
        "calibration domains",
        f"by decode: share of the scored tokens that decode computed; a row that changes decode "
        f"alone has no margin of a set of which that is less than {LEAST_SHARE:.0%}",
        "bounds: one-sided, 95 %, paired bootstrap over examples, windows or runs",
        f"with transfer: bytes over {settings.link_gbps:g} Gb/s added to the median answer, "
        "reckoned, not measured",
    ]
    if any(row.beside for row in rows):
        notes.append(
            "peers' searches score our calibration lines by our KL: a comparison of searches, not "
            "of the papers' data or objectives"
        )
    if any(row.search and row.search.get("shared") for row in rows):
        notes.append("peers know one removal set for both stages, so theirs is shared")
    if any(row.name == "unified" for row in rows):
        notes.append(
            "unified: both stages in one replica; tokens equal those of its plan by construction, "
            "so do times without transfer, and nothing is sent"
        )
    titles = {row.name: row.title for row in rows}
    notes += [f"{titles[row]}: rests on the plan of `{base}`" for row, base in bases.items()]
    return notes


def caveats(settings: ReproduceSettings, rows: Sequence[RowOutcome], dtype: str) -> list[str]:
    """Reasons why numbers must not be quoted as claims."""
    sets = rows[0].data if rows else {}
    reasons = [
        f"{name}: {len(data.primary.dense):,} examples; points lost need 2,000"
        for name, data in sets.items()
        if data.primary.is_accuracy and len(data.primary.dense) < 2_000
    ]
    reasons += [
        f"{name}: {data.num_left_out:,} tokens of text lie beyond the limit"
        for name, data in sets.items()
        if data.num_left_out
    ]
    shortest = min((data.min_prompt_tokens for data in sets.values()), default=128)
    if shortest < 128:
        reasons.append(
            f"the shortest prompt has {shortest} tokens; a reduction is quoted for 128 or more"
        )
    if dtype != "bfloat16":
        reasons.append(f"the engine ran in {dtype}; a reduction is quoted in bfloat16")
    runs = [timing.num_runs for row in rows for timing in row.latency]
    if runs and min(runs) < 30:
        reasons.append(f"{min(runs)} timed runs; a speed-up is quoted from 30")
    if any(timing.clock == "cpu" for row in rows for timing in row.latency):
        reasons.append("times are CPU seconds of one thread, which other load does not stretch")
    if not settings.split:
        reasons.append("the split of the data is not stated")
    return reasons


def mean_accuracy(paper: Paper, row: str) -> str:
    """A row's mean accuracy in words, for a line of progress."""
    number = paper.number(row, MEAN, ACCURACY)
    return "" if number is None else f", mean accuracy {number.plan:.2f}"
