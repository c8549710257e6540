"""Images in calibration lines: every visual token is a word that follows the vocabulary.

A search runs token ids, chunk by chunk. The embeddings that the vision tower makes of an image, one
per visual token that is kept, become rows of a longer embedding table, and prompts name them by ids
that follow the model's own. So scoring, healing and measuring all see a prompt with its images, and
evaluators on other nodes need neither the files nor a tower.

Candidates are compared with the dense blocks on the same visual tokens; the cost of pruning those
tokens is measured by ``evaluate``. Shapes: W = visual words, T = tokens run, E = hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayapp.data.image_lines import ImageLineReader, TokenizedImageLine
from rayapp.data.lines import ImageLine, TokenizedLine
from rayapp.errors import DataError, IntegrityError, PlanError, RequestError
from rayapp.models.architecture import sliding_windows, text_config
from rayapp.models.blocks import find_decoder
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.loading import load_model
from rayapp.models.stack import BlockStack
from rayapp.plan import Mode, PruningPlan, StagePlan, VisualTokens
from rayapp.settings import DType
from rayapp.vision.inputs import ImageInput, ImageIntake
from rayapp.vision.llava import check_takes_images, load_image_processor
from rayapp.vision.prompt import PromptEmbeddings
from rayapp.vision.reader import ImageReader, ImageSupport


@dataclass(frozen=True)
class VisualWords:
    """Embeddings ``rows_WE`` of the words from ``first_id`` on."""

    first_id: int
    rows_WE: torch.Tensor


def teach(model: PreTrainedModel, words: VisualWords | None) -> None:
    """Lengthen the model's embedding table by ``words``; logits stay as they are.

    Raises:
        IntegrityError: The words do not follow those that the model knows.
    """
    if words is None:
        return
    decoder = find_decoder(model)
    known: torch.Tensor = decoder.embed_tokens.weight.data
    if len(known) != words.first_id:
        raise IntegrityError(
            f"visual words begin at id {words.first_id}, but the model knows {len(known)} words"
        )
    rows_WE = words.rows_WE.to(known.device, known.dtype)
    decoder.embed_tokens = nn.Embedding.from_pretrained(torch.cat([known, rows_WE]), freeze=True)


class ImageWordReader:
    """Turns lines about images into token ids; one reader serves all files that a model reads.

    Args:
        path: Model directory.
        tokenizer: The model's tokenizer.
        rule: How visual tokens are pruned; None keeps all of them.
        dtype: Element type that the model is run in.
        device: The device that the vision tower runs on.
        ends_in_text: Whether the last prompt token must be text, because decode runs it.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        rule: VisualTokens | None = None,
        *,
        dtype: DType = "auto",
        device: str = "cpu",
        ends_in_text: bool = False,
    ) -> None:
        self._config = config = Checkpoint(path).config
        self._path, self._rule, self._dtype, self._device = path, rule, dtype, device
        self._intake = ImageIntake(config)
        self._lines = ImageLineReader(
            tokenizer,
            self._intake,
            text_config(config).max_position_embeddings,
            ends_in_text=ends_in_text,
        )
        self._inputs: dict[Path, ImageInput] = {}
        self._first_ids: dict[str, int] = {}
        self._rows: list[torch.Tensor] = []
        self._next_id = self._taken = -1

    def read(self, line: ImageLine, where: str, directory: Path) -> TokenizedLine:
        """Tokenise a line whose paths begin at ``directory``; its kept visual tokens become ids.

        Raises:
            DataError: The line (named by ``where``) cannot be used.
            ModelError: The model's images are not supported.
            PlanError: The rule cannot be applied to this model.
        """
        tokenized = self._lines.read(line, where, directory)
        try:
            images = [self._input(path) for path in tokenized.images]
            prompt = self._reader.embed(tokenized.asked, images, self._rule, tokenized.words)
        except RequestError as error:
            raise DataError(f"{where}: {error}") from None
        rule = self._rule.model_dump_json() if self._rule else ""
        gapless = prompt.is_compact or not prompt.num_visual_tokens_removed
        return TokenizedLine(
            prompt=tuple(self._ids(tokenized, prompt, images)),
            continuation=tokenized.continuation,
            task=tokenized.task,
            positions=None if gapless else (*prompt.positions_T.tolist(), prompt.next_position),
            num_removed=prompt.num_visual_tokens_removed,
            image_keys=tuple(image.digest + rule for image in images),
            ends=tokenized.ends,
        )

    def take(self) -> VisualWords | None:
        """The words that lines brought since the last call; None if they brought none."""
        if not self._rows:
            return None
        words = VisualWords(self._taken, torch.cat(self._rows))
        self._rows, self._taken = [], self._next_id
        return words

    @cached_property
    def _reader(self) -> ImageReader:
        """Vision tower, projector and embeddings; blocks only if the rule needs their attention."""
        check_takes_images(self._config)
        gaps = self._rule is not None and self._rule.positions == "original"
        if gaps and any(sliding_windows(self._config)):
            raise PlanError(
                "visual_tokens with original positions cannot be searched on a model with sliding "
                "windows; use compact positions, or calibrate on text"
            )
        plan = PruningPlan()
        if self._rule is None or self._rule.method != "fastv":
            signature = Checkpoint(self._path).signature()
            none = StagePlan(blocks=dict.fromkeys(range(signature.num_blocks), Mode.REMOVED))
            plan = PruningPlan(model=signature, prefill=none, decode=none)
        loaded = load_model(
            self._path, plan=plan, stage="prefill", dtype=self._dtype, device=self._device
        )
        self._next_id = self._taken = len(find_decoder(loaded.model).embed_tokens.weight)
        stack = BlockStack(loaded.model, plan, "prefill")
        return ImageReader(loaded.model, stack, ImageSupport(load_image_processor(self._path)))

    def _input(self, path: Path) -> ImageInput:
        if path not in self._inputs:
            (self._inputs[path],) = self._intake.take_all([path])
        return self._inputs[path]

    def _ids(
        self, tokenized: TokenizedImageLine, prompt: PromptEmbeddings, images: Sequence[ImageInput]
    ) -> Iterator[int]:
        """Ids of the prompt as it is run: its own, with those of visual words in between."""
        own = iter([token for token in tokenized.asked if token != self._intake.image_token_id])
        done = 0
        for image, (start, stop) in zip(images, prompt.image_spans, strict=True):
            yield from (next(own) for _ in range(done, start))
            first = self._word(image, prompt.hidden_TE[start:stop])
            yield from range(first, first + stop - start)
            done = stop
        yield from own

    def _word(self, image: ImageInput, kept_KE: torch.Tensor) -> int:
        """Id of the first word of an image; an unpruned image has the same words in every line."""
        if self._rule is None and image.digest in self._first_ids:
            return self._first_ids[image.digest]
        first = self._first_ids[image.digest] = self._next_id
        self._rows.append(kept_KE.cpu())
        self._next_id += len(kept_KE)
        return first
