"""The questions: right, reproducible, disjoint between splits, spread in length and depth."""

from __future__ import annotations

import hashlib
import json
import random
import re
from itertools import combinations

import pytest

from rayapp.errors import InputError
from rayapp.testbed.tasks import (
    LENGTHS,
    MIN_PAIRS,
    SPLIT_SHARES,
    SPLITS,
    TASKS,
    generate,
    split_of,
    write_jsonl,
)


def records(prompt: str) -> list[str]:
    line, _, _ = prompt.partition("\n")
    return line.split(" ")


def solve(prompt: str) -> tuple[str, str]:
    """The task and answer of a prompt, worked out from its text alone."""
    line, question, rest = prompt.split("\n")
    assert rest == ""
    assert question.endswith("?")
    name = question[:-1]
    found = [
        part[len(name) + 1 :]
        for part in line.split(" ")
        if re.match(re.escape(name) + "[=:]", part)
    ]
    assert len(found) == 1, "a question has exactly one record"
    if name == "add":
        left, right = found[0].split("+")
        return "add", str(int(left) + int(right))
    if name == "sort":
        return "sort", "".join(sorted(found[0]))
    return (name if name == "copy" else "retrieval"), found[0]


def operands(prompt: str, task: str) -> object:
    """The identity that a split keeps to itself: the whole prompt, or its record's operands."""
    if task == "retrieval":
        return prompt
    text = next(part for part in records(prompt) if part.startswith(f"{task}:"))
    shown = text.partition(":")[2]
    if task == "add":
        return frozenset(shown.split("+"))
    return frozenset(shown) if task == "sort" else shown


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", LENGTHS)
def test_answers_are_right_and_lengths_hold(task: str, length: str) -> None:
    low, high = LENGTHS[length]
    examples = generate(task, "test", 60, 3, length=length)
    for example in examples:
        assert solve(example.prompt) == (task, example.completion)
        assert example.task == task
        assert low <= len(example.prompt.encode()) <= high
        pairs = [part for part in records(example.prompt) if "=" in part]
        assert len({part[:2] for part in pairs}) == len(pairs)
        if task == "retrieval":
            assert len(pairs) >= MIN_PAIRS
    sizes = [len(example.prompt) for example in examples]
    if (task, length) != ("retrieval", "short"):
        assert min(sizes) < low + 0.25 * (high - low)
        assert max(sizes) > high - 0.25 * (high - low)


def test_examples_never_change() -> None:
    lines = [
        json.dumps(example.line(), sort_keys=True)
        for task in TASKS
        for split in SPLITS
        for length in LENGTHS
        for example in generate(task, split, 2, 7, length=length)
    ]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "d77dcb3440343954d988bac1da18351ef34f3a750cd139e714843105786752cb"


def test_a_smaller_count_is_a_prefix_and_seeds_differ() -> None:
    many = generate("sort", "heal", 8, 0)
    assert generate("sort", "heal", 3, 0) == many[:3]
    assert not set(many) & set(generate("sort", "heal", 8, 1))


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_neither_prompts_nor_operands(task: str) -> None:
    seen = {
        split: {
            operands(example.prompt, task)
            for example in generate(task, split, 120, 0, length="short")
        }
        for split in SPLITS
    }
    for one, other in combinations(SPLITS, 2):
        assert not seen[one] & seen[other]


def test_split_shares_are_the_documented_ones() -> None:
    found = [split_of(f"{number}") for number in range(4000)]
    assert sum(SPLIT_SHARES.values()) == pytest.approx(1)
    for split, share in SPLIT_SHARES.items():
        assert found.count(split) / len(found) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("task", TASKS)
def test_evidence_lies_at_uniform_depth(task: str) -> None:
    depths = []
    for example in generate(task, "calibration", 300, 0):
        question = example.prompt.split("\n")[1][:-1]
        places = [
            index
            for index, part in enumerate(records(example.prompt))
            if re.match(re.escape(question) + "[=:]", part)
        ]
        depths.append((places[0] + 0.5) / len(records(example.prompt)))
    quarters = [sum(q / 4 <= depth < (q + 1) / 4 for depth in depths) / 300 for q in range(4)]
    assert all(0.16 < share < 0.34 for share in quarters)


def test_the_global_random_state_is_neither_read_nor_written() -> None:
    random.seed(1)
    state = random.getstate()
    first = generate("copy", "train", 2, 0)
    assert random.getstate() == state
    random.seed(2)
    assert generate("copy", "train", 2, 0) == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("divide", "test", 1, 0), "task='divide'"),
        (("add", "dev", 1, 0), "split='dev'"),
        (("add", "test", -1, 0), "count=-1"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, str, int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(*arguments)
    with pytest.raises(InputError, match="length='huge'"):
        generate("add", "test", 1, 0, length="huge")


def test_jsonl_lines_are_examples(tmp_path) -> None:
    examples = generate("add", "calibration", 3, 0)
    write_jsonl(tmp_path / "add.jsonl", examples)
    lines = (tmp_path / "add.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [example.line() for example in examples]
    assert set(json.loads(lines[0])) == {"prompt", "completion", "task"}
