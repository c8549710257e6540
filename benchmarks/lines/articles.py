"""Lines made of published articles: a fact asked for at the end, and the article's own next words.

A *fact* is one sentence with a made-up code, put between two sentences of an article at uniform
depth and asked for at the end. *Text* is an article that is cut off; it has no end marker. Both are
of prompts of real text, so the evidence for an answer lies anywhere. Articles are split by a hash
of their text, and every one is used once.
"""

from __future__ import annotations

import hashlib
import random
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rayapp.data.json_lines import read_objects
from rayapp.data.lines import TokenizedLine
from rayapp.errors import InputError
from rayapp.pruning.evaluator.calibration import Calibration, cut

TASKS = ("fact", "text")
THINGS = ("harbour", "library", "museum", "garden", "station", "factory", "bridge", "castle")
CALIBRATION_SHARE = 64
"""Articles of 256 that calibration lines are made of; all others are judged on."""
_FRAME = re.compile(r"\A(###\n)?(Article: |Passage \d+:\n)|\n\nSummarize the above.*\Z", re.DOTALL)


def add_articles(options: ArgumentParser) -> None:
    """Options of lines that are made of articles instead of the test-bed's questions."""
    options.add_argument(
        "--articles", type=Path, nargs="+", metavar="FILE",
        help="JSON lines with articles in `prompt`: real text instead of the test-bed's questions",
    )  # fmt: skip
    options.add_argument("--caption", help="the model's name and origin, as the page tells it")
    options.add_argument("--prompt-tokens", type=int, nargs=2, default=[300, 450])
    options.add_argument("--answer-tokens", type=int, default=16, help="of an article that goes on")


@dataclass(frozen=True)
class ArticleLines:
    """Makes lines of the articles in ``files``, JSON lines whose ``prompt`` holds an article.

    Attributes:
        tokenizer: The model's tokenizer.
        files: The files.
        min_tokens: Tokens of the shortest prompt.
        max_tokens: Tokens of the longest prompt.
        text_tokens: Tokens of a text's continuation.
    """

    tokenizer: PreTrainedTokenizerBase
    files: Sequence[Path]
    min_tokens: int
    max_tokens: int
    text_tokens: int

    @classmethod
    def asked(cls, tokenizer: PreTrainedTokenizerBase, arguments: Namespace) -> ArticleLines:
        """As the options of :func:`add_articles` say."""
        return cls(tokenizer, arguments.articles, *arguments.prompt_tokens, arguments.answer_tokens)

    def drawn(self, split: str, per_task: int, seed: int) -> Calibration:
        """Equally many lines of both tasks; raises :class:`InputError` if articles are too few."""
        articles = self._articles(split, seed)
        lines: list[TokenizedLine] = []
        for ids, text, rng in articles:
            task = TASKS[len(lines) % len(TASKS)]
            lines.append(self._fact(text, rng) if task == "fact" else self._text(ids, rng))
            if len(lines) == per_task * len(TASKS):
                return cut(lines)
        raise InputError(
            f"{len(lines)} articles of the {split} split have {self.max_tokens} tokens or more, "
            f"{per_task * len(TASKS)} are needed; give more files, or fewer lines or tokens"
        )

    def _articles(self, split: str, seed: int) -> Iterator[tuple[list[int], str, random.Random]]:
        """Articles that are long enough, in random order, with their tokens and their dice."""
        found = []
        for file in self.files:
            for _, fields in read_objects(file):
                text = " ".join(_FRAME.sub("", str(fields["prompt"])).split())
                digest = hashlib.sha256(text.encode()).digest()
                if (digest[0] < CALIBRATION_SHARE) == (split == "calibration"):
                    order = hashlib.sha256(f"{seed}/{text}".encode()).hexdigest()
                    found.append((order, text))
        for order, text in sorted(set(found)):
            ids = self.tokenizer(text, verbose=False)["input_ids"]
            if len(ids) >= self.max_tokens + self.text_tokens:
                yield ids, text, random.Random(order)

    def _text(self, ids: list[int], rng: random.Random) -> TokenizedLine:
        length = rng.randint(self.min_tokens, self.max_tokens)
        return TokenizedLine(
            tuple(ids[:length]), tuple(ids[length : length + self.text_tokens]), "text"
        )

    def _fact(self, text: str, rng: random.Random) -> TokenizedLine:
        thing, code = rng.choice(THINGS), f"{rng.randrange(10_000):04d}"
        asked = f"The secret code of the {thing} is"
        question = f"\n\nQuestion: What is the secret code of the {thing}?\nAnswer: {asked}"
        sentences = re.split(r"(?<=[.!?]) ", text)
        length = rng.randint(self.min_tokens, self.max_tokens)
        depth = rng.random()
        while True:  # Whole sentences leave, until the prompt is as long as wanted.
            at = round(depth * len(sentences))
            told = [*sentences[:at], f"{asked} {code}.", *sentences[at:]]
            prompt = self._ids(" ".join(told) + question)
            if len(prompt) <= length or len(sentences) == 1:
                return TokenizedLine(prompt, self._ids(f" {code}."), "fact")
            spare = max(1, len(sentences) * (len(prompt) - length) // (2 * len(prompt)))
            sentences = sentences[:-spare]

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
