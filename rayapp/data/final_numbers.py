"""Final numbers of worked answers: a completion whose last line is ``#### 18`` is judged by it.

That is how GSM8K writes its answers (arXiv:2110.14168). An answer's final number is the one behind
its first ``####``, or else its last one, as lm-evaluation-harness reads it.
"""

from __future__ import annotations

import re
from decimal import Decimal

MARK = "####"
ANSWER_TOKENS = 256
"""Tokens of a greedy answer that is judged by its number, as many as the harness allows."""
NEXT_QUESTION = "Question:"
"""The words at which an answer is cut off: it goes on to a question of its own (the harness)."""

_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+"
_MARKED = re.compile(rf"\n{MARK}\s*({_NUMBER})\s*$")


def marked_number(completion: str) -> str | None:
    """The number in the last line of a worked completion, as plain digits; None of another one."""
    marked = _MARKED.search(completion)
    return _plain(marked[1]) if marked else None


def final_number(answer: str) -> str | None:
    """The final number of an answer, as plain digits; None if it has no number."""
    text = answer.partition(NEXT_QUESTION)[0]
    before, _, behind = text.partition(MARK)
    found = re.findall(_NUMBER, behind)[:1] or re.findall(_NUMBER, before)[-1:]
    return _plain(found[0]) if found else None


def _plain(number: str) -> str:
    """A number's value without signs of currency, separators, and zeros that say nothing."""
    value = Decimal(number.replace("$", "").replace(",", ""))
    return f"{value.normalize():f}" if value else "0"
