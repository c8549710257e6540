"""Which numbers of the guides come from which result file.

A number is looked for in one line of a guide, which its first words identify, behind the numbers of
that line that stand before it in the list. Its value is where
``path`` leads in the record: keys, positions, and ``key=value`` for the item of a list that has it,
or ``key=value,key=value``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from tests.docs.guides import ROOT

FRONT, RESULTS = "README.md", "benchmarks/README.md"
SERVING = "rayapp/distributed/README.md"
HEADLINE = "headline-testbed-text"
PICTURED, NUM_PICTURED = "all-1-4-kv8-int4", 12
"""The plan of the picture on the front page, and the number of blocks of its model."""
REAL = "real_model-smollm2-135m"
NUM_BLOCKS = 30


class Number(NamedTuple):
    """A number as a guide shows it, and where its value stands.

    Attributes:
        page: The guide, by its name in the project.
        line: How the line begins.
        shown: The format of the value, ``{:.2f}x`` for instance.
        record: The result file, without its ending.
        path: To the value, its parts divided by ``/``.
        scale: What it is multiplied by.
        minus_from: What it is taken from.
    """

    page: str
    line: str
    shown: str
    record: str
    path: str
    scale: float = 1.0
    minus_from: float | None = None

    def text(self) -> str:
        """The number as it must be shown."""
        value = value_at(self.record, self.path) * self.scale
        return self.shown.format(value if self.minus_from is None else self.minus_from - value)


@cache
def record(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))


def value_at(name: str, path: str) -> float:
    """The value in a record at a path."""
    found = record(name)
    for part in path.split("/"):
        wanted = [pair.split("=") for pair in part.split(",")]
        if isinstance(found, dict):
            found = found[part]
        elif len(wanted[0]) == 2:
            (found,) = [item for item in found if all(str(item[k]) == v for k, v in wanted)]
        else:
            found = found[int(part)]
    return float(found)


def _tested(page: str, line: str, plan: str, shown: dict[str, str]) -> Iterator[Number]:
    """Numbers of a plan on the test examples, in the formats of a page."""
    for path, form in shown.items():
        yield Number(page, line, form, HEADLINE, f"test/{plan}/{path}")


def _front(line: str, plan: str) -> Iterator[Number]:
    """The numbers of a plan of the real model."""
    row = f"rows/name={plan}"
    for stage, form in (("prefill", "| {:g} /"), ("decode", "/ {:g} |")):
        yield Number(FRONT, line, form, REAL, f"{row}/{stage}_removed", minus_from=NUM_BLOCKS)
    (known,) = [each for each in record(REAL)["rows"] if each["name"] == plan]
    measured = {(number["data"], number["metric"]) for number in known["numbers"]}
    for name, (form, minus_from) in FRONT_FORMS.items():
        data, metric = (pair.split("=")[1] for pair in name.partition("/")[0].split(","))
        if (data, metric) in measured:  # A plan that was not timed shows a dash.
            yield Number(FRONT, line, form, REAL, f"{row}/numbers/{name}", minus_from=minus_from)


LOST = {"worst_lost": "{:.2f} (", "worst_lost_upper": "({:.2f})"}
FRONT_FORMS = {
    "data=batch 1,metric=TTFT ms/difference": ("| {:.2f}x |", None),
    "data=batch 1,metric=answer ms/difference": ("| {:.2f}x |", None),
    "data=all data,metric=bytes of a timed prompt/difference": ("| {:.2f}x |", None),
    "data=mean,metric=margin kept/plan": ("| {:.1f} % (", None),
    "data=mean,metric=margin kept/bound": ("({:.1f}) |", 100.0),
    "data=XSum,metric=perplexity/plan": ("| {:.2f} |", None),
}
DENSE, PERPLEXITY = "rows/name=dense/numbers", "data=XSum,metric=perplexity/plan"
RESULT_FORMS = {
    **LOST,
    "speed/speedup": "| {:.2f}x |",
    "speed/speedup_batch8": "| {:.2f}x |",
    "reduction": "| {:.2f}x |",
}
FRONT_ROWS = {
    f"| [{name}](benchmarks/results/{REAL}.md) |": plan
    for name, plan in (
        ("our search, 4 blocks of prefill", "late-p4-d0"),
        ("POP's rule, 4 blocks of prefill", "pop-p4-d0"),
        ("POP's rule, 6 blocks of prefill", "pop-p6-d0"),
        ("POP's rule, 8 blocks of prefill", "pop-p8-d0"),
        ("all blocks, int8 KV", "int8"),
    )
}
RESULT_ROWS = {
    "| blocks, healed |": "all-1-4-kv2-model",
    "| healed, int4, 4.95x asked for |": "all-1-4-kv4.95-int4",
    "| healed, int4, 8x asked for |": "all-1-4-kv8-int4",
    "| healed, int4, 8.6x asked for |": "all-1-4-kv8.6-int4",
    "| parts, not healed |": "none-1-3-parts-kv2-model",
    "| parts, not healed, int4 |": "none-1-2-parts-kv4.95-int4",
}
ENGINE_FORMS = {
    "engine_tokens_per_wall_s": ("| {:.0f} |", 1.0),
    "generate_tokens_per_wall_s": ("| {:.0f} |", 1.0),
    "ratio_wall": ("| {:.2f} |", 1.0),
    "bytes_per_step": ("| {:.1f} |", 1e-6),
    "gb_per_s": ("| {:.1f} |", 1.0),
}


def _numbers() -> Iterator[Number]:
    for line, plan in FRONT_ROWS.items():
        yield from _front(line, plan)
    yield Number(FRONT, "| dense |", "| {:.2f} |", REAL, f"{DENSE}/{PERPLEXITY}")
    for line, plan in RESULT_ROWS.items():
        yield from _tested(RESULTS, line, plan, RESULT_FORMS)
    per_task = "test/all-1-4-kv8-int4/examples_per_task"
    yield Number(RESULTS, "sends its KV in part", "{:,.0f} ", HEADLINE, per_task)
    for word, dtype in (("float32", "float32"), ("bf16", "bfloat16")):
        engine = f"decode_engine-smollm2-135m-{dtype}"
        for batch in (1, 8, 32):
            for key, (form, scale) in ENGINE_FORMS.items():
                path = f"results/batch={batch}/{key}"
                yield Number(SERVING, f"| {word}, {batch} |", form, engine, path, scale)


NUMBERS = tuple(_numbers())

DERIVED = {
    "0.2": "kv_rules: points of exact match that int4 loses, from 99.8 %",
    "1.12": "parameters of the vision test-bed in millions, from its card",
    "0.7": "ablation: points that int8 loses more than all entries do, the least of three models",
    "2.4": "ablation: the same, the most of three models",
    "0.85": "visual_quality-testbed-vision: dense less TrimTokenator at 64 tokens",
    "4.3": "visual_quality-testbed-vision-no-words: dense less TrimTokenator at 64 tokens",
    "0.15": "tests/models/products/test_stages.py: tolerance of bf16 logits",
    "20.56": "PDTrim's abstract, in per cent",
    "1.2056": "PDTrim's abstract",
    "4.95": "PDTrim's abstract",
}
"""Decimal numbers beside results that no page shows: differences, and what others published."""
