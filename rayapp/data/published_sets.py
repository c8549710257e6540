"""A directory of published sets as files of lines: to calibrate on, to heal on, and to judge by.

Calibration and healing draw on train splits of WikiText, PIQA and instructions, and on nothing
else. What calibrates never heads a table, so judged sets of those domains are named apart. Tasks
answered by one letter or word are no judged sets: decode would compute no scored token.

The layout is ``wikitext2/``, ``piqa/``, ``instructions/dolly.jsonl``, ``arc/``, ``hellaswag/``,
``socialiqa/``, ``lambada/`` and ``long_prompts/``; a set that is missing is left out.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rayapp.data.json_lines import read_objects
from rayapp.data.lines import ChoiceLine, Line, parse_line
from rayapp.errors import DataError

PROMPT_WORDS, CONTINUATION_WORDS = 96, 32
"""Words of a paragraph that are a calibration line's prompt, and of its continuation (project
default)."""
COMPLETION_WORDS = 48
"""Words of a completion that calibration scores at most (project default); no end marker follows
a completion that is cut off."""
MIN_LINES = 8
"""Smallest number of lines of a heal file, since every eighth only judges (project default)."""

_CALIBRATION = {
    "WikiText": "wikitext2/train*.txt",
    "PIQA": "piqa/train*.jsonl",
    "instructions": "instructions/dolly*.jsonl",
}
_JUDGED = {
    "ARC-e": "arc/arc_easy_test*.jsonl",
    "ARC-c": "arc/arc_challenge_val*.jsonl",
    "HellaSwag": "hellaswag/val*.jsonl",
    "Social IQa": "socialiqa/val*.jsonl",
    "LAMBADA": "lambada/test*.jsonl",
    "XSum": "long_prompts/xsum*.jsonl",
}
_CALIBRATION_DOMAINS = {"PIQA": "piqa/val*.jsonl", "WikiText": "wikitext2/test*.txt"}
_TEXTS = ("XSum", "WikiText")
IN_DOMAIN = " (calibration domain)"
"""Ending of the name of a judged set that is of a calibration domain."""


@dataclass(frozen=True)
class PublishedFiles:
    """The files that a directory of published sets became.

    Attributes:
        calibration: Calibration files, disjoint by prompt.
        heal_data: Lines for healing, disjoint from them; None if too few were left.
        judged: Files of judged sets by name.
    """

    calibration: tuple[str, ...]
    heal_data: str | None = None
    judged: Mapping[str, str] = field(default_factory=dict)


def write_files(
    directory: str | Path,
    out: str | Path,
    *,
    num_sets: int,
    lines_per_task: int,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    judged_by: Collection[str] = (),
    text_tokens: int | None = None,
) -> PublishedFiles:
    """Write the files of a directory of published sets into ``out``.

    Args:
        directory: The directory, in the layout above.
        out: Directory of the files.
        num_sets: Number of calibration sets.
        lines_per_task: Number of lines that a calibration set has of every task at most.
        seed: Seed of the draw of calibration lines.
        tokenizer: Its chat template, if it has one, is put around instructions; it counts tokens.
        judged_by: Names of the judged sets that are wanted; all without any.
        text_tokens: Number of tokens after which a judged text ends, at the next paragraph.

    Raises:
        DataError: There is nothing to calibrate on or to judge by, or a line is malformed.
    """
    home, target = Path(directory), Path(out)
    # The task keeps its plain name, so that what calibrates is known to be of the same one.
    judged = {
        f"{name}{ending}": list(_objects(name, home, pattern))
        for ending, sets in (("", _JUDGED), (IN_DOMAIN, _CALIBRATION_DOMAINS))
        for name, pattern in sets.items()
        if _file(home, pattern) is not None
    }
    missing = sorted(set(judged_by) - set(judged))
    if missing:
        raise DataError(
            f"{home}: holds no set {missing[0]!r} to judge by; use some of {', '.join(judged)}"
        )
    as_chat = partial(_as_chat, tokenizer)
    pools = _pools(home, _judged_prompts(judged.values()), seed, as_chat)
    for what, found, known in (
        ("calibrate on", pools, _CALIBRATION),
        ("judge by", judged, _JUDGED),
    ):
        if not found:
            listed = ", ".join(known.values())
            raise DataError(f"{home}: holds no set to {what}; give one of {listed}")
    target.mkdir(parents=True, exist_ok=True)
    share = min(lines_per_task, *(len(pool) // (num_sets + 1) for pool in pools.values()))
    if not share:
        fewest = min(pools, key=lambda name: len(pools[name]))
        raise DataError(
            f"{home}: {len(pools[fewest])} lines of {fewest} do not make {num_sets} calibration "
            f"sets and a heal set; give {num_sets + 1} or more, or fewer sets"
        )
    sets = [
        [line for pool in pools.values() for line in pool[n * share : (n + 1) * share]]
        for n in range(num_sets)
    ]
    rest = [line for pool in pools.values() for line in pool[num_sets * share :][: 8 * share]]
    return PublishedFiles(
        tuple(_written(target / f"calibration-{n}.jsonl", lines) for n, lines in enumerate(sets)),
        _written(target / "heal.jsonl", rest) if len(rest) >= MIN_LINES else None,
        {
            name: _written(
                target / f"judged-{_plain(name)}.jsonl", _cut(lines, text_tokens, tokenizer)
            )
            for name, lines in judged.items()
            if not judged_by or name in judged_by
        },
    )


def _file(home: Path, pattern: str) -> Path | None:
    return min(home.glob(pattern), default=None)


def _pools(
    home: Path, judged: set[str], seed: int, as_chat: Callable[[str], str]
) -> dict[str, list[dict[str, Any]]]:
    """Calibration lines by task, in a drawn order; no prompt comes twice, and none is judged."""
    pools = {}
    for task, pattern in _CALIBRATION.items():
        file = _file(home, pattern)
        if file is None:
            continue
        passages = file.suffix == ".txt"
        lines = _passages(file) if passages else _completions(file, as_chat)
        by_hash = {prompt_hash(line["prompt"]): line | {"task": task} for line in lines}
        hashes = sorted(set(by_hash) - judged)
        random.Random(f"{seed} {task}").shuffle(hashes)
        pools[task] = [by_hash[key] for key in hashes]
    return pools


def prompt_hash(prompt: str) -> str:
    """Hash of a prompt; case and white space make no difference."""
    return hashlib.sha256(" ".join(prompt.casefold().split()).encode()).hexdigest()


def _judged_prompts(sets: Iterable[Sequence[Mapping[str, Any]]]) -> set[str]:
    """Hashes of all prompts that a plan is judged by."""
    return {prompt_hash(line["prompt"]) for lines in sets for line in lines if "prompt" in line}


def _passages(file: Path) -> Iterator[dict[str, Any]]:
    """Lines of long paragraphs: their beginning, and how it goes on."""
    for paragraph in _paragraphs(file):
        words = paragraph.split()
        if len(words) >= PROMPT_WORDS + CONTINUATION_WORDS:
            rest = words[PROMPT_WORDS : PROMPT_WORDS + CONTINUATION_WORDS]
            prompt, completion = " ".join(words[:PROMPT_WORDS]), " " + " ".join(rest)
            yield {"prompt": prompt, "completion": completion, "ends": False}


def _completions(file: Path, as_chat: Callable[[str], str]) -> Iterator[dict[str, Any]]:
    """Lines of a file, questions with their right choice; chat for the lines of no benchmark."""
    for number, fields in read_objects(file):
        line = parse_line(fields, f"{file} line {number}")
        prompt = as_chat(line.prompt) if isinstance(line, Line) else line.prompt
        answered = line.answered if isinstance(line, ChoiceLine) else line
        completion = _shortened(answered.completion)
        cut_off = {} if completion == answered.completion else {"ends": False}
        yield {"prompt": prompt, "completion": completion, **cut_off}


def _as_chat(tokenizer: PreTrainedTokenizerBase | None, instruction: str) -> str:
    """An instruction in the form in which the model reads one."""
    if tokenizer is None or not tokenizer.chat_template:
        return instruction
    messages = [{"role": "user", "content": instruction}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _shortened(completion: str) -> str:
    """The first words of a long completion."""
    words = completion.split(" ")
    return " ".join(words[:COMPLETION_WORDS])


def _objects(name: str, home: Path, pattern: str) -> Iterator[dict[str, Any]]:
    """The lines of a judged set, with its name as their task."""
    file = _file(home, pattern)
    assert file is not None, "only sets that are there are read"
    if file.suffix == ".txt":
        yield from ({"text": paragraph, "task": name} for paragraph in _paragraphs(file))
        return
    for number, fields in read_objects(file):
        line = parse_line(fields, f"{file} line {number}")
        if name in _TEXTS:
            yield {"text": _article(line.prompt), "task": name}
        else:
            yield line.model_copy(update={"task": name}).model_dump(exclude={"image"})


def _article(prompt: str) -> str:
    """An article without the words that ask for its summary."""
    _, _, rest = prompt.rpartition("Article: ")
    return rest.partition("\n\nSummarize")[0].strip()


def _paragraphs(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{file}: cannot be read ({reason}); give a text file") from None
    return [line.strip() for line in text.split("\n") if line.strip()]


def _cut(
    lines: Sequence[Mapping[str, Any]],
    most: int | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Iterator[Mapping[str, Any]]:
    """The lines of a judged set, those of texts up to a number of tokens."""
    count = 0
    for line in lines:
        if most is not None and count >= most:
            return
        if most is not None and tokenizer is not None and "text" in line:
            count += len(tokenizer(line["text"], verbose=False)["input_ids"])
        yield line


def _plain(name: str) -> str:
    """A name for a file, without spaces and brackets."""
    return re.sub(r"[^\w]+", "-", name.lower()).strip("-")


def _written(file: Path, lines: Iterable[Mapping[str, Any]]) -> str:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    return str(temporary.replace(file))
