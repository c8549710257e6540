"""Questions with known answers: the prompts that the text test-bed is trained and judged on.

A prompt is one line of records, then a question on a line of its own::

    qk=wev copy:mbwhmryncp zu=aoi add:47+85 fn=kld sort:rmdfka
    sort?

and its completion is the bare answer (``adfkmr``), after which the model ends. Records are pairs (a
key of two letters, a value of three) and at most one each of ``copy``, ``sort`` and ``add``; the
record that a question asks for lies anywhere in the line, so every prompt also tests how far back
the model can reach. Keys are unique in a prompt, so every question has one answer.

Splits are disjoint by construction: the SHA-256 hash of a question's identity decides its split.
The identity is the whole prompt for retrieval, and the operands for the other tasks (the unordered
pair of numbers, the set of letters, the string), so no operand of one split's questions appears in
those of another.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rayapp.errors import InputError

TASKS = ("retrieval", "copy", "sort", "add")
"""The tasks, in the order in which tables list them."""

OPERATIONS = ("copy", "sort", "add")
"""Tasks whose record is named after the task; a prompt has at most one record of each."""

SPLIT_SHARES = {"train": 0.55, "heal": 0.1, "calibration": 0.1, "validation": 0.1, "test": 0.15}
"""Share of the hash range that each split owns, in this order."""

SPLITS = tuple(SPLIT_SHARES)
"""Names of the splits."""

LENGTHS = {"short": (40, 130), "long": (300, 500), "mixed": (128, 400)}
"""Least and greatest prompt length of each class, in tokens (bytes), both included."""

MIN_PAIRS = 16
"""Least number of pairs of a retrieval prompt."""

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PAIR_COST = len("kd=wxy ")
_COPY_LETTERS = 10
_SORT_LETTERS = 6


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its only right completion.

    Attributes:
        prompt: The text that the model reads, up to and including the newline after the question.
        completion: The answer, without the end marker that the model must write after it.
        task: One of ``TASKS``.
    """

    prompt: str
    completion: str
    task: str

    def line(self) -> dict[str, str]:
        """The example as a line of a calibration or evaluation file."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a prompt's first line and the question that asks for it.

    Attributes:
        task: One of ``TASKS``.
        shown: The entry, for example ``kd=wxy`` or ``add:47+85``.
        question: The text before the question mark, ``kd`` or ``add``.
        answer: The completion.
        operands: The question's identity for the split; empty for pairs.
    """

    task: str
    shown: str
    question: str
    answer: str
    operands: str

    @property
    def asked(self) -> str:
        """The question line, without the newline before it."""
        return f"{self.question}?\n"


def below(rng: random.Random, limit: int) -> int:
    """A whole number in ``[0, limit)`` from ``rng.random``, the one draw Python keeps stable."""
    return int(rng.random() * limit)


def split_of(identity: str) -> str:
    """The split that owns an identity (a prompt, or ``Record.operands``)."""
    digest = hashlib.sha256(identity.encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    for split, share in SPLIT_SHARES.items():
        position -= share
        if position < 0:
            return split
    return SPLITS[-1]


def identity_of(record: Record, prompt: str) -> str:
    """The text that decides the split of the question for ``record`` that ends ``prompt``."""
    return record.operands or prompt


def render(records: Sequence[Record], subject: Record) -> str:
    """The prompt that shows ``records`` and asks for ``asked``."""
    return " ".join(record.shown for record in records) + "\n" + subject.asked


def _letters(rng: random.Random, count: int) -> str:
    return "".join(_LETTERS[below(rng, 26)] for _ in range(count))


def _distinct_letters(rng: random.Random, count: int) -> str:
    pool = list(_LETTERS)
    return "".join(pool.pop(below(rng, len(pool))) for _ in range(count))


def _any_operation(rng: random.Random, task: str) -> Record:
    if task == "copy":
        text = _letters(rng, _COPY_LETTERS)
        return Record("copy", f"copy:{text}", "copy", text, f"copy:{text}")
    if task == "sort":
        text = _distinct_letters(rng, _SORT_LETTERS)
        answer = "".join(sorted(text))
        return Record("sort", f"sort:{text}", "sort", answer, f"sort:{answer}")
    left, right = 10 + below(rng, 90), 10 + below(rng, 90)
    operands = f"add:{min(left, right)}+{max(left, right)}"
    return Record("add", f"add:{left}+{right}", "add", str(left + right), operands)


def draw_operation(rng: random.Random, task: str, split: str) -> Record:
    """A ``copy``, ``sort`` or ``add`` record whose operands belong to ``split``."""
    while True:
        record = _any_operation(rng, task)
        if split_of(record.operands) == split:
            return record


def draw_pairs(rng: random.Random, count: int) -> list[Record]:
    """Draw ``count`` pairs with distinct keys."""
    keys: set[str] = set()
    pairs: list[Record] = []
    while len(pairs) < count:
        key = _letters(rng, 2)
        if key not in keys:
            keys.add(key)
            value = _letters(rng, 3)
            pairs.append(Record("retrieval", f"{key}={value}", key, value, ""))
    return pairs


def place(rng: random.Random, pairs: list[Record], operations: Sequence[Record]) -> list[Record]:
    """The records of a prompt, with ``operations`` at uniform places among ``pairs``."""
    records = list(pairs)
    for operation in operations:
        records.insert(below(rng, len(records) + 1), operation)
    return records


def _bystanders(rng: random.Random, task: str, split: str, room: int) -> list[Record]:
    """Records of the other operations, each with probability 1/2, at most ``room`` tokens."""
    chosen = []
    for operation in OPERATIONS:
        if operation == task or rng.random() < 0.5:
            continue
        record = draw_operation(rng, operation, split)
        if len(record.shown) + 1 <= room:
            room -= len(record.shown) + 1
            chosen.append(record)
    return chosen


def _draw(rng: random.Random, task: str, split: str, low: int, high: int) -> Example:
    """One example of ``low`` to ``high`` tokens, its evidence at a uniform place."""
    target = low + below(rng, high - low - _PAIR_COST + 2)
    min_pairs = MIN_PAIRS if task == "retrieval" else 0
    evidence = [] if task == "retrieval" else [draw_operation(rng, task, split)]
    question = len("kd?\n") if task == "retrieval" else len(task) + 2
    fixed = question + sum(len(record.shown) + 1 for record in evidence)
    others = _bystanders(rng, task, split, high - fixed - min_pairs * _PAIR_COST)
    fixed += sum(len(record.shown) + 1 for record in others)
    count = max(min_pairs, -(-(target - fixed) // _PAIR_COST))
    pairs = draw_pairs(rng, count)
    subject = evidence[0] if evidence else pairs[below(rng, count)]
    return Example(render(place(rng, pairs, [*evidence, *others]), subject), subject.answer, task)


def generate(
    task: str, split: str, count: int, seed: int, *, length: str = "mixed"
) -> list[Example]:
    """Draw examples; they are the same on every machine and Python version.

    Example ``i`` depends on the arguments and ``i`` alone, so a smaller ``count`` gives a prefix.

    Args:
        task: One of ``TASKS``.
        split: One of ``SPLITS``.
        count: Number of examples to draw.
        seed: Seed of the draw; other seeds give other examples of the same split.
        length: Prompt length in tokens: ``short`` (40 to 130; retrieval at least 116), ``long``
            (300 to 500) or ``mixed`` (128 to 400), uniform up to the length of a pair.

    Returns:
        ``count`` examples, the evidence at a uniform place among the records of each prompt.

    Raises:
        InputError: If ``task``, ``split`` or ``length`` is unknown, or ``count`` is negative.
    """
    for name, value, known in (
        ("task", task, TASKS),
        ("split", split, SPLITS),
        ("length", length, tuple(LENGTHS)),
    ):
        if value not in known:
            raise InputError(f"{name}={value!r} is unknown; use one of {', '.join(known)}")
    if count < 0:
        raise InputError(f"count={count} is negative; ask for 0 or more examples")
    low, high = LENGTHS[length]
    examples = []
    for index in range(count):
        rng = random.Random(f"rayapp.testbed/{task}/{split}/{length}/{seed}/{index}")
        example = _draw(rng, task, split, low, high)
        while task == "retrieval" and split_of(example.prompt) != split:
            example = _draw(rng, task, split, low, high)
        examples.append(example)
    return examples


def write_jsonl(path: Path | str, examples: Sequence[Example]) -> None:
    """Write examples as JSON lines, the format of calibration and evaluation files."""
    lines = (json.dumps(example.line(), ensure_ascii=False) for example in examples)
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
