"""Many questions about one scene in one sequence, where each sees only the picture and itself.

A row is visual tokens, all 576 or a part, then questions with their answers end to end. Every
question starts at the position after the picture and attends to the picture and to its own earlier
tokens, as if it stood there alone: its logits are those of the single prompt. So one pass over the
picture teaches some two dozen answers.

Shapes: B = rows, N = visual tokens, Q = tokens of questions, T = N + Q,
D = hidden size, K = supervised tokens, V = ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlavaForConditionalGeneration

from rayapp.testbed.vision.questions.patches import NUM_PATCHES
from rayapp.testbed.vision.questions.questions import TYPES, Question
from rayapp.testbed.vision.questions.words import END_ID, IDS, PAD_ID


@dataclass(frozen=True, slots=True)
class Packed:
    """The packed questions of B scenes.

    Attributes:
        ids_BQ: Token ids, padded at the end.
        places_BQ: Number of tokens since the start of the own question.
        segments_BQ: Number of the question that a token belongs to; padding is a segment too.
        targets_BQ: The token to predict, at supervised places.
        kinds_BQ: 0 unsupervised; 1 + index in ``TYPES`` where the answer is predicted; and
            ``END_KIND`` where the end marker is.
    """

    ids_BQ: torch.Tensor
    places_BQ: torch.Tensor
    segments_BQ: torch.Tensor
    targets_BQ: torch.Tensor
    kinds_BQ: torch.Tensor


END_KIND = 1 + len(TYPES)


def _question_ids(question: Question) -> list[int]:
    return [IDS[word] for word in question.text.split()]


def _pack_row(questions: Sequence[Question], num_tokens: int) -> list[list[int]]:
    """Ids, places, segments, targets and kinds of one row; questions without room are left out."""
    columns: list[list[int]] = [[], [], [], [], []]
    for segment, question in enumerate(questions):
        prompt_ids, answer = _question_ids(question), IDS[question.answer]
        length = len(prompt_ids) + 1
        if len(columns[0]) + length > num_tokens:
            break
        values = (
            [*prompt_ids, answer],
            range(length),
            [segment] * length,
            [*([PAD_ID] * (length - 2)), answer, END_ID],
            [*([0] * (length - 2)), 1 + TYPES.index(question.task), END_KIND],
        )
        for column, added in zip(columns, values, strict=True):
            column.extend(added)
    left = num_tokens - len(columns[0])
    fillers = (PAD_ID, 0, len(questions), PAD_ID, 0)
    for column, filler in zip(columns, fillers, strict=True):
        column.extend([filler] * left)
    return columns


def pack(rows: Sequence[Sequence[Question]], num_tokens: int) -> Packed:
    """Pack the questions of every scene in order into ``num_tokens`` tokens, as many as fit."""
    columns = [_pack_row(questions, num_tokens) for questions in rows]
    return Packed(*(torch.tensor(list(column)) for column in zip(*columns, strict=True)))


def question_mask(packed: Packed, num_visual: int) -> torch.Tensor:
    """The questions' mask, ``(B, 1, Q, T)``: 0 for visible tokens, minus infinity elsewhere."""
    segments_BQ = packed.segments_BQ
    same_BQQ = segments_BQ[:, :, None] == segments_BQ[:, None, :]
    allowed_BQQ = same_BQQ.tril()
    mask_BQQ = torch.zeros(allowed_BQQ.shape).masked_fill(~allowed_BQQ, -torch.inf)
    return torch.nn.functional.pad(mask_BQQ, (num_visual, 0))[:, None]


@dataclass(frozen=True, slots=True)
class PackedOutput:
    """Outputs of the language model on packed rows.

    Attributes:
        logits_KV: Logits where ``kinds_BQ`` is not 0, fp32.
        halfway_BND: States of the visual tokens after half of the blocks, fp32.
    """

    logits_KV: torch.Tensor
    halfway_BND: torch.Tensor


def run_packed(
    model: LlavaForConditionalGeneration,
    visual_BND: torch.Tensor,
    packed: Packed,
    kept_BN: torch.Tensor | None = None,
) -> PackedOutput:
    """Run the language model on packed rows.

    Args:
        model: A model prepared by ``attend_packed``.
        visual_BND: Visual tokens after the projector.
        packed: Questions of the same scenes.
        kept_BN: Patches of the visual tokens, ascending, which are their positions; None if all are
            shown.
    """
    language = model.model.language_model
    questions_BQD = language.embed_tokens(packed.ids_BQ)
    num_visual = visual_BND.shape[1]
    if kept_BN is None:
        kept_BN = torch.arange(NUM_PATCHES).expand(len(visual_BND), -1)
    output = language(
        inputs_embeds=torch.cat([visual_BND.to(questions_BQD.dtype), questions_BQD], dim=1),
        position_ids=torch.cat([kept_BN, NUM_PATCHES + packed.places_BQ], dim=1),
        question_mask=question_mask(packed, num_visual),
        use_cache=False,
        output_hidden_states=True,
    )
    hidden_KD = output.last_hidden_state[:, num_visual:][packed.kinds_BQ > 0]
    halfway = output.hidden_states[len(language.layers) // 2]
    return PackedOutput(model.lm_head(hidden_KD).float(), halfway[:, :num_visual].float())
