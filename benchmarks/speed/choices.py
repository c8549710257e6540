"""Multiple choice beside transformers' own forward passes over the same questions."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hardware.clock import Moment
from hardware.turns import in_turns

from rayapp.data.lines import ChoiceLine
from rayapp.evaluation.measures.choices import Question, choice_likelihoods, tokenize_question
from rayapp.evaluation.measures.likelihood import BATCH_TOKENS, TwoStages
from rayapp.models.loading import LoadedModel, load_model
from rayapp.plan import PruningPlan


def choices_part(arguments: Namespace) -> dict[str, Any]:
    """Seconds of our choices, and of forward passes over the same tokens, alternated."""
    loaded = load_model(arguments.model, dtype=arguments.dtype[-1])
    questions = _questions(arguments, loaded)
    side = TwoStages(loaded.model, PruningPlan())
    rows = [question.prompt + c for question in questions for c in question.choices]
    once = [sum(question.choices, question.prompt) for question in questions]
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: list(choice_likelihoods(side, questions)),
        "a row per choice": lambda: forward(loaded.model, rows),
        "every token once": lambda: forward(loaded.model, once),
    }
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for name, counts in in_turns(list(sides), arguments.runs):
        began = Moment.now(torch.device("cpu"))
        sides[name]()
        span = Moment.now(torch.device("cpu")).since(began)
        if counts:
            seconds[name].append({"wall_s": span.wall_s, "cpu_s": span.cpu_s})
    return {
        "num_questions": len(questions),
        "num_choices": len(rows),
        "dtype": arguments.dtype[-1],
        "tokens": {
            "a row per choice": sum(map(len, rows)),
            "every token once": sum(map(len, once)),
        },
        "seconds": seconds,
    }


def _questions(arguments: Namespace, loaded: LoadedModel) -> list[Question]:
    questions = []
    for file in arguments.questions:
        for number, text in enumerate(file.read_text("utf-8").splitlines()[: arguments.limit], 1):
            line = ChoiceLine.model_validate(json.loads(text))
            where = f"{file.name} line {number}"
            questions.append(tokenize_question(line, loaded.tokenizer, where, 8192))
    return questions


@torch.inference_mode()
def forward(model: Any, rows: Sequence[tuple[int, ...]]) -> None:
    """Forward passes of the whole model over padded batches, sorted by length; logits only."""
    ordered = sorted(rows, key=len, reverse=True)
    while ordered:
        size = max(1, BATCH_TOKENS // len(ordered[0]))
        batch, ordered = ordered[:size], ordered[size:]
        ids = torch.zeros((len(batch), len(batch[0])), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(batch):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        model(input_ids=ids, attention_mask=mask, use_cache=False)
