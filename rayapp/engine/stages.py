"""Both stages of a plan over one model in one process, and the handoff between them.

This module joins prefill, wire, decode and the ledger's record without a network in between. KV is
packed, checked and unpacked as if it travelled: the service over two nodes must give the same
answers token for token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rayapp.engine.decode import DecodeEngine
from rayapp.engine.prefill import PrefillEngine
from rayapp.engine.request import GenerationRequest, Timeline, TokenBatch
from rayapp.kv.ledger import KVShape, Route, TransferRecord, TransferTimes, account
from rayapp.kv.segment import KVSegment
from rayapp.kv.wire import Envelope, message_sizes, pack, unpack
from rayapp.models.architecture import text_config
from rayapp.models.blocks import signature_of
from rayapp.models.loading import eos_token_ids
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan
from rayapp.vision.reader import ImageReader, ImageSupport

NODE = "local"


class Stages:
    """The prefill engine of a model, its decode engines, and the handoff between them.

    Args:
        model: A dense model, whose weights both stages share.
        tokenizer: The model's tokenizer, needed for stop strings.
        plan: The plan; None runs the dense model.
        max_model_len: Limit of prompt and answer tokens together; None takes the model's limit.
        images: The reader of images, needed for prompts with images.

    Raises:
        ModelError: The architecture is not supported.
        PlanError: The plan was made for another model, or prunes visual tokens of a text model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        plan: PruningPlan | None = None,
        *,
        max_model_len: int | None = None,
        images: ImageSupport | None = None,
    ) -> None:
        self.plan = plan or PruningPlan()
        self.signature = signature_of(model)
        self.plan.check_model(self.signature)
        self.max_model_len = max_model_len or text_config(model.config).max_position_embeddings
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids(model)
        self._decode_stack = BlockStack(model, self.plan, "decode")
        prefill_stack = BlockStack(model, self.plan, "prefill")
        self.images = ImageReader(model, prefill_stack, images) if images else None
        self.prefill = PrefillEngine(
            prefill_stack,
            self.plan,
            max_model_len=self.max_model_len,
            eos_token_ids=self._eos_token_ids,
            tokenizer=tokenizer,
            images=self.images,
        )
        self._kv_shape = KVShape.of(self._decode_stack)

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary: token ids lie in ``0..vocab_size - 1``."""
        return self._decode_stack.vocab_size

    def decode_engine(self, *, max_num_seqs: int, max_model_len: int | None = None) -> DecodeEngine:
        """Build an idle engine of the decode stage.

        Args:
            max_num_seqs: Number of sequences that decode at once.
            max_model_len: Limit of prompt and answer tokens together; None takes the limit of both
                stages.
        """
        return DecodeEngine(
            self._decode_stack,
            self.plan,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len or self.max_model_len,
            eos_token_ids=self._eos_token_ids,
            tokenizer=self._tokenizer,
        )

    def start(
        self,
        request: GenerationRequest,
        decode: DecodeEngine,
        timeline: Timeline,
        deliver: Callable[[TokenBatch], None],
    ) -> TransferRecord | None:
        """Prefill a request and hand its KV over to a decode engine.

        Args:
            request: The request to answer.
            decode: An engine from :meth:`decode_engine` with a free slot.
            timeline: The timeline in which prefill and handoff are marked.
            deliver: Called with the first answer token as soon as prefill has sampled it.

        Returns:
            The transfer's record; None if no KV was sent because the first token was the last.
        """
        timeline.prefill_started_s = time.monotonic()
        output = self.prefill.run(request)
        timeline.prefill_finished_s = time.monotonic()
        if output.first is not None:
            deliver(replace(output.first, prompt_logprobs=output.prompt_logprobs))
        if output.segment is None:
            return None
        record = self.hand_over(request, output.segment, decode, first=output.first)
        timeline.admitted_s = time.monotonic()
        return record

    def hand_over(
        self,
        request: GenerationRequest,
        segment: KVSegment,
        decode: DecodeEngine,
        *,
        first: TokenBatch | None = None,
        replay: Sequence[int] = (),
    ) -> TransferRecord:
        """Send a prompt's KV as a message into a slot of a decode engine; return the record.

        Args:
            request: The request that is answered.
            segment: The KV of its prompt.
            decode: A decode engine with a free slot.
            first: The first answer token, as in :meth:`rayapp.engine.decode.DecodeEngine.admit`.
            replay: Answer tokens that the client already has, as in the same method.
        """
        envelope = Envelope(
            request_id=request.request_id,
            attempt=request.attempt,
            plan_fingerprint=self.plan.fingerprint,
            weights_fingerprint=self.signature.weights_fingerprint,
        )
        begun_s = time.monotonic()
        message = pack(segment, envelope)
        packed_s = time.monotonic()
        decode.admit(request, unpack(message, envelope), first, replay)
        return account(
            self._kv_shape,
            self.plan,
            message_sizes(message),
            Route(request.request_id, request.attempt, NODE, NODE),
            num_prompt_tokens=request.num_prompt_tokens,
            num_visual_tokens_removed=segment.num_visual_tokens_removed,
            times=TransferTimes(put_s=packed_s - begun_s, fetch_s=time.monotonic() - packed_s),
        )
