"""Records from before there was one recorder, brought to the layout of today.

They are results of measurements, so their files stay as they are. Other names in a record are
replaced here, and facts that only its page had are added. A layout is dropped when its last result
is measured anew.
"""

from __future__ import annotations

from typing import Any

_RENAMED = {
    "repeats": "runs",
    "decode_repeats": "decode_runs",
    "new_tokens": "answer_tokens",
    "lines_per_task": "calibration_per_task",
    "scale": "shape",
}
_TOLD_BY_PAGES = {"headline-testbed-text": {"runs": 30}}
"""Options that only the pages had, by the name of the result."""


def brought_up_to_date(stored: dict[str, Any], stem: str) -> dict[str, Any]:
    """An old record as it would be written today; ``stem`` is the name of its file."""
    benchmark, _, name = stem.partition("-")
    if benchmark == "visual_quality":
        asked = {"model": name, "dtype": stored["dtype"]}
        stored = {"configuration": asked, "comparison": stored} | {
            key: stored[key] for key in ("machine", "wall_s", "cpu_s")
        }
    if benchmark == "headline":
        tested = [row["examples_per_task"] for row in stored["test"].values()]
        asked = {"model": stored["model"], "test_per_task": max(tested, default=0)}
        stored = {**stored, "configuration": asked}
    if benchmark == "kv_rules":
        asked = stored["configuration"]
        known = {"plan": asked["plan"], "dtype": asked["dtype"]}
        stored = {**stored, **known, "configuration": asked | {"plan": None}}
    if benchmark == "visual_speed":
        stored = {**stored, "image_tokens": stored["arguments"]["image_tokens"]}
    if "parts" in stored:
        parts = {name: _with_configuration(part, stem) for name, part in stored["parts"].items()}
        return {"benchmark": benchmark, "parts": parts}
    return {"benchmark": benchmark, **_with_configuration(stored, stem)}


def _with_configuration(stored: dict[str, Any], stem: str) -> dict[str, Any]:
    asked = stored.get("configuration") or stored["arguments"]
    renamed = {_RENAMED.get(key, key): value for key, value in asked.items()}
    rest = {k: v for k, v in stored.items() if k not in ("arguments", "configuration")}
    return {"configuration": renamed | _TOLD_BY_PAGES.get(stem, {}), **rest}
