"""Exact match: the share of answers that greedy decoding gets right, end marker included."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayapp.errors import InputError
from rayapp.testbed.tasks import Example

_MAX_GROUP_TOKENS = 16_384


def _groups(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> Iterator[list[tuple[Example, list[int]]]]:
    """Examples with equally long prompts, a bounded number of tokens at a time."""
    by_length: dict[int, list[tuple[Example, list[int]]]] = defaultdict(list)
    for example in examples:
        ids = tokenizer(example.prompt)["input_ids"]
        by_length[len(ids)].append((example, ids))
    for length in sorted(by_length):
        group = by_length[length]
        size = max(1, _MAX_GROUP_TOKENS // length)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> float:
    """Greedy exact match per completion.

    Prompts of equal length share a batch, so nothing is padded. An answer counts only if the end
    marker follows it.

    Args:
        model: A causal language model; scored in its own dtype.
        tokenizer: Its tokenizer.
        examples: Questions with their answers; at least one.

    Returns:
        Share of right completions, 0 to 1.

    Raises:
        InputError: If there are no examples.
    """
    if not examples:
        raise InputError("examples=[] leaves nothing to score; pass at least one example")
    end = tokenizer.eos_token_id
    right = 0
    for group in _groups(tokenizer, examples):
        ids_BT = torch.tensor([ids for _, ids in group], device=model.device)
        wanted = [[*tokenizer(example.completion)["input_ids"], end] for example, _ in group]
        with torch.inference_mode():
            output_BT = model.generate(
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=max(map(len, wanted)),
                do_sample=False,
                eos_token_id=end,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers = output_BT[:, ids_BT.shape[1] :].tolist()
        right += sum(
            answer[: len(want)] == want for answer, want in zip(answers, wanted, strict=True)
        )
    return right / len(examples)
