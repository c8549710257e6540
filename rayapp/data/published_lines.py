"""Lines of public benchmarks as they are published, put as prompt, choices and answer.

A file exported from PIQA, HellaSwag, ARC, OpenBookQA, CommonsenseQA, Social IQa, BoolQ, MMLU, CMMLU
or C-Eval needs no conversion: the keys say which it is, and name the task where the line does not.
GSM8K, LAMBADA and Dolly are completions (:func:`as_completion`).
Prompts and choices are those of lm-evaluation-harness (v0.4, zero shots), so that accuracies can be
laid beside its own; the descriptions that it sets before CMMLU's and C-Eval's subjects are left
out, since their lines do not name the subject.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from rayapp.data.json_lines import checked_line
from rayapp.errors import DataError

LETTERS = "ABCDEFGHIJ"
CHINESE_ANSWER = "答案\uff1a"


class _Published(BaseModel):
    """A line of one benchmark; keys that no prompt shows are not read."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    marks: ClassVar[frozenset[str]]
    """The keys by which such a line is known."""
    task: str = ""

    @abstractmethod
    def asked(self) -> tuple[str, list[str], int]:
        """The prompt, its choices as they continue it, and the index of the right one."""

    def asked_whole(self) -> tuple[str, list[str], int]:
        """The same with whole answers (cloze) where choices would be letters."""
        return self.asked()


class _Options(BaseModel):
    """Choices of ARC, OpenBookQA and CommonsenseQA: texts with their labels."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    text: list[str]
    label: list[str]

    def index(self, key: str) -> int:
        """Index of the choice with this label."""
        return _place(self.label, key.strip())


class _Piqa(_Published):
    marks = frozenset({"goal", "sol1", "sol2"})
    goal: str
    sol1: str
    sol2: str
    label: int | str

    def asked(self) -> tuple[str, list[str], int]:
        return f"Question: {self.goal}\nAnswer:", _spaced([self.sol1, self.sol2]), int(self.label)


class _HellaSwag(_Published):
    marks = frozenset({"ctx_a", "ctx_b", "endings"})
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: list[str]
    label: int | str

    def asked(self) -> tuple[str, list[str], int]:
        prompt = _plain(f"{self.activity_label}: {self.ctx_a} {self.ctx_b.capitalize()}")
        return prompt, _spaced([_plain(ending) for ending in self.endings]), int(self.label)


class _Arc(_Published):
    marks = frozenset({"question", "choices", "answerKey"})
    question: str
    choices: _Options
    answerKey: str

    def asked(self) -> tuple[str, list[str], int]:
        prompt = f"Question: {self.question}\nAnswer:"
        return prompt, _spaced(self.choices.text), self.choices.index(self.answerKey)


class _OpenBookQA(_Published):
    marks = frozenset({"question_stem", "choices", "answerKey"})
    question_stem: str
    choices: _Options
    answerKey: str

    def asked(self) -> tuple[str, list[str], int]:
        right = self.choices.index(self.answerKey)
        return self.question_stem, _spaced(self.choices.text), right


class _CommonsenseQA(_Arc):
    marks = _Arc.marks | {"question_concept"}

    def asked(self) -> tuple[str, list[str], int]:
        prompt = _lettered(f"Question: {self.question.strip()}", self.choices.text, "Answer:")
        letters = _spaced(LETTERS[: len(self.choices.text)])
        return prompt, letters, self.choices.index(self.answerKey)

    def asked_whole(self) -> tuple[str, list[str], int]:
        return super().asked()


class _SocialIQa(_Published):
    marks = frozenset({"context", "question", "answerA", "answerB", "answerC"})
    context: str
    question: str
    answerA: str
    answerB: str
    answerC: str
    label: int | str

    def asked(self) -> tuple[str, list[str], int]:
        answers = [self.answerA, self.answerB, self.answerC]
        return f"Q: {self.context} {self.question}\nA:", _spaced(answers), int(self.label) - 1


class _BoolQ(_Published):
    """A line with ``label`` as in SuperGLUE, or ``answer`` as in the original files."""

    marks = frozenset({"passage", "question"})
    passage: str
    question: str
    label: bool | int = Field(validation_alias=AliasChoices("label", "answer"))

    def asked(self) -> tuple[str, list[str], int]:
        prompt = f"{self.passage}\nQuestion: {self.question}?\nAnswer:"
        return prompt, [" no", " yes"], int(self.label)


class _Mmlu(_Published):
    marks = frozenset({"question", "choices", "answer"})
    question: str
    choices: list[str]
    answer: int | str
    subject: str | None = None

    def asked(self) -> tuple[str, list[str], int]:
        about = (self.subject or "").replace("_", " ")
        description = "The following are multiple choice questions (with answers) about "
        prompt = _lettered(self.question.strip(), self.choices, "Answer:")
        letters = _spaced(LETTERS[: len(self.choices)])
        return (f"{description}{about}.\n\n" if about else "") + prompt, letters, self._right

    def asked_whole(self) -> tuple[str, list[str], int]:
        prompt = f"Question: {self.question.strip()}\nAnswer:"
        return prompt, _spaced(self.choices), self._right

    @property
    def _right(self) -> int:
        if isinstance(self.answer, int):
            return self.answer
        return _place(LETTERS[: len(self.choices)], self.answer)


class _CEval(_Published):
    marks = frozenset({"question", "A", "B", "C", "D"})
    question: str
    A: str
    B: str
    C: str
    D: str
    answer: str

    def asked(self) -> tuple[str, list[str], int]:
        prompt = _lettered(self.question.strip(), [self.A, self.B, self.C, self.D], CHINESE_ANSWER)
        return prompt, _spaced("ABCD"), _place("ABCD", self.answer)

    def asked_whole(self) -> tuple[str, list[str], int]:
        prompt = f"{self.question.strip()}\n{CHINESE_ANSWER}"
        return prompt, _spaced([self.A, self.B, self.C, self.D]), _place("ABCD", self.answer)


class _Cmmlu(_CEval):
    """C-Eval's line with two keys in capitals."""

    marks = frozenset({"Question", "A", "B", "C", "D"})
    question: str = Field(alias="Question")
    answer: str = Field(alias="Answer")


FORMATS: dict[str, type[_Published]] = {
    "PIQA": _Piqa,
    "HellaSwag": _HellaSwag,
    "CommonsenseQA": _CommonsenseQA,
    "ARC": _Arc,
    "OpenBookQA": _OpenBookQA,
    "Social IQa": _SocialIQa,
    "BoolQ": _BoolQ,
    "MMLU": _Mmlu,
    "CMMLU": _Cmmlu,
    "C-Eval": _CEval,
}
"""The benchmarks' lines by name; a line belongs to the first whose marks it has."""
WINOGRANDE = frozenset({"sentence", "option1", "option2"})


def as_choices(
    fields: Mapping[str, Any], where: str, *, whole_answers: bool = False
) -> dict[str, Any] | None:
    """A published line as ``prompt``, ``choices``, ``answer`` and ``task``; None if it is none.

    Args:
        fields: The line.
        where: The line's file and number, for errors.
        whole_answers: Let choices be the answers themselves (cloze) where the harness asks for
            letters, so that both stages answer: a letter is a single token, mostly prefill's.

    Raises:
        DataError: A key is missing or of another type, the split has no answers, or the benchmark
            scores one continuation after several prompts (WinoGrande); ``where`` is named.
    """
    keys = set(fields)
    if "prompt" in keys:
        return None
    if keys >= WINOGRANDE:
        raise DataError(
            f"{where}: a line of WinoGrande, which scores one ending after several beginnings; "
            "run lm-evaluation-harness on an exported checkpoint instead"
        )
    name = next((title for title, kind in FORMATS.items() if keys >= kind.marks), None)
    if name is None:
        return None
    line = checked_line(FORMATS[name], dict(fields), where)
    try:
        prompt, choices, answer = line.asked_whole() if whole_answers else line.asked()
    except ValueError as error:
        raise DataError(
            f"{where}: the answer of this line of {name} is not one of its choices "
            f"({error}); use a split with answers"
        ) from None
    read = {"prompt": prompt, "choices": choices, "answer": answer, "task": line.task or name}
    return read | ({"ends": fields["ends"]} if "ends" in fields else {})


def as_completion(fields: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """A published line of GSM8K, LAMBADA or Dolly as a completion; None if it is none.

    GSM8K's worked answers are judged by their number (:mod:`rayapp.data.final_numbers`), and
    LAMBADA's last word is cut off (``ends`` is false): its text goes on, so no end marker follows.

    Raises:
        DataError: A key is of another type; ``where`` is named.
    """
    keys = set(fields)
    if "prompt" in keys:
        return None
    name = next((title for title, kind in COMPLETIONS.items() if keys >= kind.marks), None)
    if name is None:
        return None
    line = checked_line(COMPLETIONS[name], dict(fields), where)
    return line.told() | {"task": line.task or name} | {k: fields[k] for k in keys & {"ends"}}


class _Completed(BaseModel):
    """A line with one right text; keys that no prompt shows are not read."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    marks: ClassVar[frozenset[str]]
    task: str = ""

    @abstractmethod
    def told(self) -> dict[str, Any]:
        """The prompt, its completion, and whether that ends."""


class _Gsm8k(_Completed):
    marks = frozenset({"question", "answer"})
    question: str
    answer: str

    def told(self) -> dict[str, Any]:
        return {"prompt": f"Question: {self.question}\nAnswer:", "completion": f" {self.answer}"}


class _Lambada(_Completed):
    marks = frozenset({"context", "continuation"})
    context: str
    continuation: str

    def told(self) -> dict[str, Any]:
        word = f" {self.continuation.strip()}"
        return {"prompt": self.context.rstrip(), "completion": word, "ends": False}


class _Dolly(_Completed):
    marks = frozenset({"instruction", "response"})
    instruction: str
    response: str
    context: str = ""

    def told(self) -> dict[str, Any]:
        asked = "\n\n".join(filter(None, (self.context.strip(), self.instruction)))
        return {"prompt": f"{asked}\n", "completion": self.response}


COMPLETIONS: dict[str, type[_Completed]] = {
    "GSM8K": _Gsm8k,
    "LAMBADA": _Lambada,
    "Dolly": _Dolly,
}
"""Published lines of completions by name; a line belongs to the first whose marks it has."""


def _spaced(choices: Any) -> list[str]:
    """Choices after a space, which the harness sets between prompt and choice."""
    return [f" {choice}" for choice in choices]


def _lettered(question: str, choices: list[str], ending: str) -> str:
    named = "".join(f"{k}. {choice}\n" for k, choice in zip(LETTERS, choices, strict=False))
    return f"{question}\n{named}{ending}"


def _place(labels: Any, key: str) -> int:
    known = list(labels)
    if key not in known:
        raise ValueError(f"{key!r} of {', '.join(known)}")
    return known.index(key)


def _plain(text: str) -> str:
    """A text of HellaSwag without the brackets of its WikiHow part."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
