"""Evaluation files: lines of four kinds, sorted by task.

A line is a completion ``{"prompt", "completion"}``, a multiple choice ``{"prompt", "choices",
"answer"}``, a text ``{"text"}`` or a conversation ``{"turns"}``; any line may name its ``"task"``.
A completion may be about images (:mod:`rayapp.data.image_lines`). A file may mix kinds, but a task
may not, because its numbers would be of two sorts. A directory stands for all files of lines in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rayapp.data.conversations import ConversationLine, chat_prompt
from rayapp.data.image_lines import ImageLineReader, TokenizedImageLine
from rayapp.data.json_lines import checked_line, read_objects
from rayapp.data.lines import (
    ChoiceLine,
    ImageLine,
    Line,
    TokenizedLine,
    has_images,
    parse_line,
    tokenize_line,
)
from rayapp.data.seen import file_digest, prompt_digest
from rayapp.data.tables import READERS
from rayapp.errors import DataError
from rayapp.evaluation.measures.choices import Question, tokenize_question
from rayapp.evaluation.measures.perplexity import TextLine, Windows, cut_windows
from rayapp.evaluation.measures.rollouts import Opening
from rayapp.evaluation.result import DataFile
from rayapp.evaluation.settings import EvaluationSettings
from rayapp.plan import Stage
from rayapp.vision.inputs import ImageIntake

Kind = Literal["completions", "choices", "texts", "conversations"]
EvaluationLine = Line | ImageLine | ChoiceLine | TextLine | ConversationLine

AS_TEXT = ", as text"
"""Ending of a task whose lines are read as text."""
_QUESTIONS = ("question", "questions")
_ENDINGS = (".jsonl", ".json", *READERS)


@dataclass(frozen=True)
class Origin:
    """The files (sha256) and prompts (hashes) that a task's examples come from."""

    files: frozenset[str]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationData:
    """Tokenised examples by task, sorted by its name.

    A task has at most ``limit`` examples. ``openings`` are the prompts of rollouts by task, and
    ``origins`` say where every task comes from.
    """

    files: tuple[DataFile, ...]
    completions: Mapping[str, Sequence[TokenizedLine]] = field(default_factory=dict)
    choices: Mapping[str, Sequence[Question]] = field(default_factory=dict)
    texts: Mapping[str, Windows] = field(default_factory=dict)
    openings: Mapping[str, Sequence[Opening]] = field(default_factory=dict)
    origins: Mapping[str, Origin] = field(default_factory=dict)

    @property
    def image_lines(self) -> list[TokenizedImageLine]:
        """Completions about images."""
        lines = (line for task in self.completions.values() for line in task)
        return [line for line in lines if isinstance(line, TokenizedImageLine)]


def read_data(
    paths: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_positions: int,
    settings: EvaluationSettings,
    images: ImageIntake | None = None,
    first_token: Stage = "prefill",
    texts: Sequence[str | Path] = (),
) -> EvaluationData:
    """Read, check and tokenise files of lines of any kind.

    Args:
        paths: The files, or directories of files.
        tokenizer: Tokenises prompts as the service does.
        max_positions: Context of the model in tokens.
        settings: Settings of the evaluation; they limit examples and say how texts are cut.
        images: Checks and counts images; None if the model is text-only.
        first_token: The stage that samples the first token, and runs the last prompt token.
        texts: Files whose lines are read as texts for perplexity, whatever their kind.

    Raises:
        DataError: There is no file, one cannot be read or is empty, a line (named) is malformed,
            too long or about an image that cannot be used, or a task has lines of two kinds.
    """
    if not paths and not texts:
        raise DataError("no data: give at least one file of JSON lines")
    reader = ImageLineReader(tokenizer, images, max_positions, ends_in_text=first_token == "decode")
    sorter = _Sorter(tokenizer, max_positions, reader, settings)
    files = [sorter.read(path) for path in _files(paths)]
    files += [sorter.read(path, as_text=True) for path in _files(texts)]
    return sorter.sorted(tuple(files))


def _files(paths: Sequence[str | Path]) -> Iterator[Path]:
    """The files themselves, and all files of lines in the directories among them."""
    for path in map(Path, paths):
        if not path.is_dir():
            yield path
            continue
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in _ENDINGS)
        if not inside:
            raise DataError(
                f"{path}: a directory without any file of lines ({', '.join(_ENDINGS)}); give one"
            )
        yield from inside


def parse_any(fields: dict[str, Any], where: str, *, whole_answers: bool = False) -> EvaluationLine:
    """A checked line of any kind; raises :class:`DataError`, naming ``where``."""
    if "turns" in fields:
        return checked_line(ConversationLine, fields, where)
    if "text" not in fields:
        return parse_line(fields, where, whole_answers=whole_answers)
    if has_images(fields):
        raise DataError(
            f"{where}: has an image and `text`, but only completions may have images; "
            "write `prompt` and `completion`, or drop the image"
        )
    return checked_line(TextLine, fields, where)


def kind_of(line: EvaluationLine) -> Kind:
    """The kind of measurement that fits a line."""
    kinds: tuple[tuple[type, Kind], ...] = (
        (TextLine, "texts"),
        (ConversationLine, "conversations"),
        (ChoiceLine, "choices"),
    )
    return next((kind for of, kind in kinds if isinstance(line, of)), "completions")


class _Sorter:
    """Lines by kind and task, sorted as they are read."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_positions: int,
        images: ImageLineReader,
        settings: EvaluationSettings,
    ) -> None:
        self._tokenizer, self._max_positions = tokenizer, max_positions
        self._images, self._settings = images, settings
        self._kinds: dict[str, tuple[Kind, str]] = {}
        self._lines: dict[Kind, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
        self._files: dict[str, set[str]] = defaultdict(set)
        self._asked: dict[str, list[tuple[str, str]]] = defaultdict(list)

    def read(self, path: Path, *, as_text: bool = False) -> DataFile:
        """Read a file; ``as_text`` makes a text of every line."""
        objects = read_objects(path)
        digest = file_digest(path)
        for number, fields in objects:
            where = f"{path} line {number}"
            line = parse_any(fields, where, whole_answers=self._settings.whole_answers)
            if as_text:
                line = _as_text(line, where)
            if isinstance(line, ConversationLine) and not line.task:
                line = line.model_copy(update={"task": _named(path)})
            self._check_kind(line, where)
            self._files[line.task].add(digest)
            self._add(line, where, path.parent)
        return DataFile(name=path.name, sha256=digest, num_examples=len(objects))

    def sorted(self, files: tuple[DataFile, ...]) -> EvaluationData:
        """Everything that was read, limited and with texts cut."""
        limited: dict[Kind, dict[str, list[Any]]] = {
            kind: {task: self._limited(lines) for task, lines in sorted(by_task.items())}
            for kind, by_task in self._lines.items()
            if kind != "texts"
        }
        texts = {
            task: cut_windows(
                lines,
                self._tokenizer,
                settings=self._settings,
                max_positions=self._max_positions,
                task=task,
            )
            for task, lines in sorted(self._lines["texts"].items())
        }
        return EvaluationData(
            files,
            limited.get("completions", {}),
            limited.get("choices", {}),
            texts,
            self._openings(limited.get("conversations", {}), texts),
            {task: self._origin(task) for task in sorted(self._kinds)},
        )

    def _limited(self, lines: list[Any]) -> list[Any]:
        limit, count = self._settings.limit, len(lines)
        if limit is None or not self._settings.spread or limit >= count:
            return lines[:limit]
        return [lines[index * count // limit] for index in range(limit)]

    def _origin(self, task: str) -> Origin:
        asked = tuple(prompt_digest(text) for text, _ in self._limited(self._asked[task]))
        return Origin(frozenset(self._files[task]), asked)

    def _check_kind(self, line: EvaluationLine, where: str) -> None:
        kind = kind_of(line)
        known, first = self._kinds.setdefault(line.task, (kind, where))
        if kind != known:
            name = f"task {line.task!r}" if line.task else "the nameless task"
            raise DataError(
                f"{where}: {name} holds {kind} here and {known} in {first}; "
                "give every kind a task of its own"
            )

    def _add(self, line: EvaluationLine, where: str, directory: Path) -> None:
        options = (self._tokenizer, where, self._max_positions)
        lines = self._lines[kind_of(line)][line.task]
        if isinstance(line, TextLine):
            lines.append(line.text)
        elif isinstance(line, ConversationLine):
            self._asked[line.task].append((line.turns[0], where))
            lines.append((line, where))
        elif isinstance(line, ChoiceLine):
            self._asked[line.task].append((line.prompt, where))
            lines.append(tokenize_question(line, *options))
        elif isinstance(line, ImageLine):
            lines.append(self._images.read(line, where, directory))
        else:
            self._asked[line.task].append((line.prompt, where))
            lines.append(tokenize_line(line, *options))

    def _openings(
        self,
        conversations: Mapping[str, list[tuple[ConversationLine, str]]],
        texts: Mapping[str, Windows],
    ) -> dict[str, list[Opening]]:
        """The prompts of rollouts by task; a conversation has all its turns."""
        count, chat = self._settings.num_rollouts, self._settings.chat
        openings: dict[str, list[Opening]] = defaultdict(list)
        for task, lines in conversations.items():
            openings[task] += [self._conversation(line, where) for line, where in lines]
        if not count:
            return openings
        for task, asked in self._asked.items():
            if task in conversations:
                continue
            some = self._limited(asked)[:count]
            openings[task] += [self._plain(prompt, where) for prompt, where in some]
            if chat:
                openings[task] += [self._chat(prompt, where) for prompt, where in some]
        for task, windows in texts.items():
            openings[task] += [
                self._checked(Opening(line.prompt, "plain"), f"a window of task {task!r}")
                for line in windows.lines[:count]
            ]
        return {task: openings[task] for task in sorted(openings)}

    def _plain(self, prompt: str, where: str) -> Opening:
        ids = tuple(self._tokenizer(prompt, verbose=False)["input_ids"])
        return self._checked(Opening(ids, "plain"), where)

    def _chat(self, prompt: str, where: str) -> Opening:
        return self._checked(Opening(chat_prompt(self._tokenizer, [prompt], where), "chat"), where)

    def _conversation(self, line: ConversationLine, where: str) -> Opening:
        """A conversation's first prompt; its second turn must fit behind the longest answer."""
        opening = self._chat(line.turns[0], where)
        if len(line.turns) < 2:
            return opening
        both = len(chat_prompt(self._tokenizer, [line.turns[0], "", line.turns[1]], where))
        self._check_length(both + self._settings.max_rollout_tokens, where)
        return Opening(opening.prompt, "chat", turns=(line.turns[0], line.turns[1]))

    def _checked(self, opening: Opening, where: str) -> Opening:
        self._check_length(len(opening.prompt), where)
        return opening

    def _check_length(self, num_tokens: int, where: str) -> None:
        longest = self._settings.max_rollout_tokens
        if num_tokens + longest > self._max_positions:
            raise DataError(
                f"{where}: {num_tokens} prompt tokens + {longest} of an answer exceed the model's "
                f"context of {self._max_positions}; shorten the line or lower --rollout-tokens"
            )


def _as_text(line: EvaluationLine, where: str) -> TextLine:
    """Any line as a text: a completion with its prompt before it."""
    if isinstance(line, TextLine):
        return line
    if isinstance(line, Line):
        task = f"{line.task or 'examples'}{AS_TEXT}"
        return TextLine(text=line.prompt + line.completion, task=task)
    raise DataError(f"{where}: is neither a text nor a completion; give it as --data instead")


def _named(path: Path) -> str:
    """The task of a file of conversations: its name, or its directory's if that says no more."""
    return path.resolve().parent.name if path.stem.lower() in _QUESTIONS else path.stem
