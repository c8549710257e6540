"""Exact match and bytes: greedy answers through the engine that serves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rayapp.data.final_numbers import final_number
from rayapp.data.image_lines import prompt_of
from rayapp.data.lines import TokenizedLine
from rayapp.engine.local import Completion, LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import IntegrityError
from rayapp.kv.ledger import TransferRecord

BATCHES_AT_ONCE = 8
"""Batches of sequences that one call answers, so that one ends as the next begins."""


@dataclass(frozen=True)
class JudgedAnswer:
    """Whether greedy decoding gave the expected answer, and the bytes of its KV.

    ``begins`` leaves the end marker aside: greedy decoding begins with the completion.
    """

    is_match: bool
    transfer: TransferRecord
    begins: bool = False


def judge_answers(
    pipeline: LocalPipeline,
    lines: Sequence[TokenizedLine],
    *,
    end_token_ids: Sequence[int] = (),
    decode: Callable[[list[int]], str] | None = None,
) -> list[JudgedAnswer]:
    """Answer every prompt greedily and compare with its continuation, end marker included.

    Decode writes exactly as many tokens as the expected answer has, without stopping early. So the
    KV of every prompt travels and is counted, even if the first token is wrong. A completion of a
    single token that is cut off gets two, since the KV of one is never sent. A worked completion is
    judged by its final number instead (:mod:`rayapp.data.final_numbers`).

    Args:
        pipeline: Prefill, wire and continuous decode of one plan.
        lines: Prompts with their expected continuations.
        end_token_ids: Tokens that may stand for the end marker beside the expected one.
        decode: The text of token ids, for lines that are judged by a number.
    """
    sampling = [_greedy(line) for line in lines]
    completions = pipeline.generate([prompt_of(line) for line in lines], sampling)
    return [
        _judge(line, completion, end_token_ids, decode)
        for line, completion in zip(lines, completions, strict=True)
    ]


def _greedy(line: TokenizedLine) -> SamplingParams:
    return SamplingParams(max_tokens=line.num_answer_tokens, temperature=0.0, ignore_eos=True)


def _judge(
    line: TokenizedLine,
    completion: Completion,
    end_token_ids: Sequence[int],
    decode: Callable[[list[int]], str] | None,
) -> JudgedAnswer:
    if completion.transfer is None:
        raise IntegrityError(
            f"an answer of {len(line.continuation)} tokens came without a transfer"
        )
    ends = (line.continuation[-1], *end_token_ids) if line.ends else tuple(end_token_ids)
    if line.number:
        is_right = _number(completion.token_ids, ends, decode) == line.number
        return JudgedAnswer(is_right, completion.transfer, is_right)
    expected = line.continuation[:-1] if line.ends else line.continuation
    begins = completion.token_ids[: len(expected)] == expected
    is_match = begins and (not line.ends or completion.token_ids[-1] in ends)
    return JudgedAnswer(is_match, completion.transfer, begins)


def _number(
    token_ids: Sequence[int], ends: Sequence[int], decode: Callable[[list[int]], str] | None
) -> str | None:
    """The final number of an answer, up to its end marker."""
    if decode is None:
        raise IntegrityError("an answer is judged by its number, and no tokenizer reads it")
    return final_number(decode(list(itertools.takewhile(lambda id_: id_ not in ends, token_ids))))
