"""One model's engines, and timed runs of a batch of prompts with one image each, dense or pruned.

Phases of a run: the images are scaled and normalised on the CPU (`prepare`); the vision tower runs
over all of them (`tower`); the prompts become embeddings, tokens chosen where the side prunes
(`embed`); prefill runs all prompts in one pass to their first tokens (`prefill`); their KV is
copied into decode's slots (`admit`); decode runs all of them, a token per step (`decode`).
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from hardware.clock import Clock
from PIL import Image
from shapes.llava import IMAGE_TOKENS, IMAGES, SIDE, image_processor
from transformers import PreTrainedModel

from rayapp.engine.decode import DecodeEngine
from rayapp.engine.prefill import PrefillEngine
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import IntegrityError
from rayapp.kv.ledger import KVShape, Route, TransferRecord, account
from rayapp.kv.wire import Envelope, message_sizes, pack
from rayapp.models.blocks import signature_of
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan, VisualTokens
from rayapp.vision.llava import LlavaAdapter
from rayapp.vision.reader import ImageReader, ImageSupport
from rayapp.vision.selection import keep_places_of_prompts

PHASES = ("prepare", "tower", "embed", "prefill", "admit", "decode")
_WORDS = 16  # tokens of a prompt's text, which images are aligned with


@dataclass(frozen=True)
class Times:
    """Seconds of one run by phase, of the selection alone, and all answers."""

    phases: dict[str, float]
    selection_s: float
    tokens: tuple[tuple[int, ...], ...]


class Bench:
    """A model under two plans, which differ in the visual tokens that they keep.

    Args:
        model: A LLaVA on its device.
        rule: The rule of the pruned side.
        text_tokens: Number of text tokens of every prompt, beside its image.
        num_answer: Number of tokens of every answer.
        clock: ``wall`` or ``cpu``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rule: VisualTokens,
        *,
        text_tokens: int,
        num_answer: int,
        clock: str,
    ) -> None:
        self.model = model
        self.rules: dict[str, VisualTokens | None] = {"dense": None, "pruned": rule}
        self.plans = {
            "dense": PruningPlan(),
            "pruned": PruningPlan(model=signature_of(model), visual_tokens=rule),
        }
        self.num_text, self.num_answer = text_tokens, num_answer
        self._clock = clock
        self.stack = BlockStack(model, PruningPlan(), "prefill")
        self.decode_stack = BlockStack(model, PruningPlan(), "decode")
        support = ImageSupport(image_processor(), max_cache_bytes=0)
        self._reader = ImageReader(model, self.stack, support)
        self._adapter = LlavaAdapter(model, self.stack, support.processor)
        self._limit = text_tokens + max(IMAGES) * IMAGE_TOKENS + num_answer
        self.prefills = {
            side: PrefillEngine(self.stack, plan, max_model_len=self._limit, images=self._reader)
            for side, plan in self.plans.items()
        }

    def requests(self, batch: int, num_images: int = 1) -> list[GenerationRequest]:
        rng = np.random.default_rng(batch)
        image_token, sampling = self._adapter.image_token_id, SamplingParams(
            max_tokens=self.num_answer, ignore_eos=True
        )  # fmt: skip
        requests = []
        for number in range(batch):
            text = rng.integers(0, image_token, self.num_text).tolist()
            images = [self._reader.intake.take(_noise(rng)) for _ in range(num_images)]
            requests.append(
                GenerationRequest(
                    str(number),
                    (text[0], *[image_token] * num_images, *text[1:]),
                    sampling,
                    images=tuple(images),
                    text_token_ids=tuple(text[-_WORDS:]),
                )
            )
        return requests

    def decode_engine(self, batch: int) -> DecodeEngine:
        """The decode engine of both sides, since pruned visual tokens change nothing in decode's
        stage.
        """
        return DecodeEngine(
            self.decode_stack,
            PruningPlan(),
            max_num_seqs=batch,
            max_model_len=self.num_text + IMAGE_TOKENS + self.num_answer,
        )

    @torch.inference_mode()
    def run(self, side: str, requests: list[GenerationRequest], decode: DecodeEngine) -> Times:
        """All phases of one batch; the selection is timed once more, after them."""
        adapter, rule = self._adapter, self.rules[side]
        pictures = [self._reader.intake.decode(request.images[0]) for request in requests]
        texts = [request.text_token_ids for request in requests]
        clock, laps = Clock(self.stack.device, self._clock), {}
        prepared = adapter.prepare(pictures)
        laps["prepare"] = clock.lap()
        images = [[image] for image in adapter.encode_prepared(prepared)]
        laps["tower"] = clock.lap()
        prompts = adapter.embed_prompts(
            [request.prompt_token_ids for request in requests], images, rule, texts=texts
        )
        laps["embed"] = clock.lap()
        outputs = self.prefills[side].run_embedded(requests, prompts)
        laps["prefill"] = clock.lap()
        answers = {
            r.request_id: list(o.first.token_ids) for r, o in zip(requests, outputs, strict=True)
        }
        for request, output in zip(requests, outputs, strict=True):
            decode.admit(request, output.segment, output.first)
        del outputs, output  # frees the KV of the whole batch
        laps["admit"] = clock.lap()
        while decode.num_running:
            for found in decode.step():
                answers[found.request_id] += found.token_ids
        laps["decode"] = clock.lap()
        if {len(answer) for answer in answers.values()} != {self.num_answer}:
            raise IntegrityError(f"answers of {[*map(len, answers.values())]} tokens were timed")
        selection_s = 0.0
        if rule is not None:
            keep_places_of_prompts(rule, images, [adapter.text_embeddings(text) for text in texts])
            selection_s = clock.lap()
        return Times(laps, selection_s, tuple(map(tuple, answers.values())))

    def transfer(self, side: str, request: GenerationRequest) -> TransferRecord:
        """The ledger's record of one prompt's KV."""
        plan, prefill = self.plans[side], self.prefills[side]
        segment = prefill.run(request).segment
        envelope = Envelope(
            request_id=request.request_id,
            attempt=0,
            plan_fingerprint=plan.fingerprint,
            weights_fingerprint=signature_of(self.model).weights_fingerprint,
        )
        return account(
            KVShape.of(self.decode_stack),
            plan,
            message_sizes(pack(segment, envelope)),
            Route(request.request_id, 0, "prefill", "decode"),
            num_prompt_tokens=request.num_prompt_tokens,
            num_visual_tokens_removed=segment.num_visual_tokens_removed,
        )


def _noise(rng: np.random.Generator) -> bytes:
    pixels = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=0)
    return buffer.getvalue()
