"""Which numbers of the guides come from which result file.

A number is looked for in one line of a guide, which its first words identify, behind the numbers of
that line that stand before it in the list. Its value is where
``path`` leads in the record: keys, positions, and ``key=value`` for the item of a list that has it.
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
NUM_BLOCKS = 12


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
        key, _, value = part.partition("=")
        if isinstance(found, dict):
            found = found[part]
        elif value:
            (found,) = [item for item in found if str(item[key]) == value]
        else:
            found = found[int(part)]
    return float(found)


def _tested(page: str, line: str, plan: str, shown: dict[str, str]) -> Iterator[Number]:
    """Numbers of a plan on the test examples, in the formats of a page."""
    for path, form in shown.items():
        yield Number(page, line, form, HEADLINE, f"test/{plan}/{path}")


def _removed(line: str, plan: str) -> Iterator[Number]:
    """The numbers of blocks that the stages of a plan run."""
    for stage, form in (("prefill", "| {:g} /"), ("decode", "/ {:g} |")):
        path = f"validation/plan_name={plan}/{stage}_remove"
        yield Number(FRONT, line, form, HEADLINE, path, minus_from=NUM_BLOCKS)


LOST = {"worst_lost": "{:.2f} (", "worst_lost_upper": "({:.2f})"}
FRONT_FORMS = {
    "speed/ttft_speedup": "| {:.2f}x |",
    "speed/speedup": "| {:.2f}x |",
    "reduction": "| {:.2f}x |",
    **LOST,
}
RESULT_FORMS = {
    **LOST,
    "speed/speedup": "| {:.2f}x |",
    "speed/speedup_batch8": "| {:.2f}x |",
    "reduction": "| {:.2f}x |",
}
FRONT_ROWS = {
    f"| [{name}](benchmarks/results/{HEADLINE}.md) |": plan
    for name, plan in (
        ("parts of blocks, no healing", "none-1-3-parts-kv2-model"),
        ("parts of blocks, int4", "none-1-2-parts-kv4.95-int4"),
        ("blocks, healed", "all-1-4-kv2-model"),
        ("blocks, healed, int4 (the picture)", "all-1-4-kv8-int4"),
        ("blocks, healed, int4, too far", "all-1-4-kv8.6-int4"),
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
        yield from _removed(line, plan)
        yield from _tested(FRONT, line, plan, FRONT_FORMS)
    for line, plan in RESULT_ROWS.items():
        yield from _tested(RESULTS, line, plan, RESULT_FORMS)
    per_task = "test/all-1-4-kv8-int4/examples_per_task"
    for page, line in ((FRONT, "Points are"), (RESULTS, "sends its KV in part")):
        yield Number(page, line, "{:,.0f} ", HEADLINE, per_task)
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
