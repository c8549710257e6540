"""Many rules at once give what each gives alone, through the library and through the engines."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayapp.data.image_lines import TokenizedImageLine
from rayapp.engine.local import ImagePrompt, LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.evaluation.visual import matches as module
from rayapp.evaluation.visual.matches import answer_logits, visual_matches
from rayapp.evaluation.visual.prompts import WORDLESS, VisualPrompts
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan, VisualTokens
from rayapp.vision.llava import LlavaAdapter
from rayapp.vision.selection import METHODS

KINDS = [("llava", "llama"), ("llava_next", "mistral")]
PLACE = 290
RULES = [VisualTokens(method=method, num_keep=keep) for method in METHODS for keep in (9, 4)]
COMPACT = VisualTokens(num_keep=6, num_aligned=0.5, positions="compact")

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def images(tmp_path_factory, encoded_image) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    for seed, size in enumerate([(20, 20), (40, 16), (20, 20)]):
        (folder / f"{seed}.png").write_bytes(encoded_image(seed, *size))
    return [folder / f"{seed}.png" for seed in range(3)]


@pytest.fixture
def opened(llava: Make, processor: Make) -> Make:
    """A function ``opened(kind, text)``: prompts over a model, and its pipeline."""

    def make(kind: str, text: str) -> tuple[VisualPrompts, LocalPipeline]:
        model = llava(kind, text)
        stack = BlockStack(model, PruningPlan(), "prefill")
        prompts = VisualPrompts(model, stack, processor(kind))
        return prompts, LocalPipeline(model, image_processor=processor(kind))

    return make


def questions(images: list[Path], count: int = 6) -> list[TokenizedImageLine]:
    """Words of two lengths about the images in turn, some about two; answers are still open."""
    found = []
    for number in range(count):
        rng = random.Random(number)
        words = tuple(rng.choices(range(100), k=4 + number % 2))
        shown = tuple(images[(number + step) % 3] for step in range(1 + (number == 2)))
        asked = (1, *(PLACE,) * len(shown), *words, 2)
        found.append(
            TokenizedImageLine((), (5, 6), f"t{number % 2}", asked=asked, words=words, images=shown)
        )
    return found


def pruned(line: TokenizedImageLine, rule: VisualTokens | None) -> ImagePrompt:
    return ImagePrompt(line.asked, line.images, line.words, rule)


@pytest.mark.parametrize(("kind", "text"), KINDS)
def test_every_rule_embeds_as_the_reader_does(kind, text, opened, images) -> None:
    prompts, pipe = opened(kind, text)
    for line in questions(images):
        asked, taken = prompts.ask(line), pipe.images.intake.take_all(line.images)
        for rule in (None, *RULES, COMPACT):
            ours = asked.embed(rule)
            theirs = pipe.images.embed(line.asked, taken, rule, line.words)
            assert torch.equal(ours.hidden_TE, theirs.hidden_TE)
            assert torch.equal(ours.positions_T, theirs.positions_T)
            assert ours.next_position == theirs.next_position


@pytest.mark.parametrize(("kind", "text"), KINDS)
def test_a_batch_gives_the_logits_of_the_serving_path(kind, text, opened, images) -> None:
    prompts, pipe = opened(kind, text)
    lines = questions(images)
    for rule in (None, RULES[0], COMPACT):
        embedded = [prompts.ask(line).embed(rule) for line in lines]
        for length in {prompt.num_tokens for prompt in embedded}:
            batch = [n for n, prompt in enumerate(embedded) if prompt.num_tokens == length]
            answers = [random.Random(n).choices(range(200), k=3) for n in batch]
            found = answer_logits(prompts.stack, [embedded[n] for n in batch], answers)
            for row, number, answer in zip(found, batch, answers, strict=True):
                alone = pipe.answer_logits(pruned(lines[number], rule), answer)
                assert torch.allclose(row, alone, atol=2e-5)


@pytest.mark.parametrize("batch_tokens", [pytest.param(1, marks=pytest.mark.slow), 200, 4_096])
def test_matches_are_those_of_greedy_answers(opened, images, monkeypatch, batch_tokens) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", batch_tokens)
    prompts, pipe = opened("llava", "llama")
    rules = [None, *RULES[:8], COMPACT]
    greedy = SamplingParams(max_tokens=2, ignore_eos=True)
    lines = questions(images)
    given = [
        [answer.token_ids for answer in pipe.generate([pruned(x, rule) for x in lines], greedy)]
        for rule in rules
    ]
    # The answer of one of the rules is the right one: other rules differ, some agree.
    lines = [replace(line, continuation=given[n % len(rules)][n]) for n, line in enumerate(lines)]
    expected = np.array([[a == x.continuation for a, x in zip(row, lines, strict=True)]
                         for row in given])  # fmt: skip
    found = visual_matches(prompts, rules, lines)
    assert found.shape == (len(rules), len(lines))
    assert 0 < expected.sum() < expected.size
    assert np.array_equal(found, expected)
    ends = visual_matches(prompts, rules, lines, end_token_ids=range(300))
    first = np.array([[a[0] == x.continuation[0] for a, x in zip(row, lines, strict=True)]
                      for row in given])  # fmt: skip
    assert np.array_equal(ends, first)


def test_each_image_is_encoded_once(opened, images, monkeypatch) -> None:
    prompts, _ = opened("llava", "llama")
    runs: list[str] = []
    encode = LlavaAdapter.encode

    def counted(self: LlavaAdapter, image: Any, **options: Any) -> Any:
        runs.append(image.digest)
        return encode(self, image, **options)

    monkeypatch.setattr(LlavaAdapter, "encode", counted)
    visual_matches(prompts, [None, *RULES], questions(images))
    assert len(runs) == len(set(runs)) == 3


def test_wordless_methods_are_those_that_no_word_changes(opened, images) -> None:
    prompts, _ = opened("llava", "llama")
    one, other = questions(images[:1] * 3, 2)
    differ = set()
    for method in METHODS:
        rule = VisualTokens(method=method, num_keep=5)
        kept = []
        for line in (one, other):
            fresh = prompts.ask(line)
            fresh._wordless = {}
            kept.append(fresh.kept(rule)[0].tolist())
        differ |= {method} if kept[0] != kept[1] else set()
    # Computations that questions share must not depend on them.
    assert differ
    assert differ.isdisjoint(WORDLESS)
    assert set(METHODS) >= WORDLESS
    first = prompts.ask(one)
    assert first.kept(RULES[4])[0] is prompts.ask(other).kept(RULES[4])[0]
    assert RULES[4].method in WORDLESS
