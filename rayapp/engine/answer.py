"""The state of one growing answer: its number of tokens, and whether the latest token ends it."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rayapp.engine.adjustment import Adjustment
from rayapp.engine.request import FinishReason, GenerationRequest
from rayapp.engine.stopping import TextStream
from rayapp.errors import RequestError


class Answer:
    """Counts the tokens of an answer and detects its end; replaying its tokens rebuilds the state.

    Args:
        request: The request that is answered.
        eos_token_ids: Tokens that end an answer unless the request ignores them.
        tokenizer: The model's tokenizer, needed if the request has stop strings.

    Raises:
        RequestError: The request has stop strings and there is no tokenizer.
    """

    def __init__(
        self,
        request: GenerationRequest,
        eos_token_ids: frozenset[int],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        sampling = request.sampling
        if sampling.stop and tokenizer is None:
            raise RequestError(
                f"stop strings {list(sampling.stop)} need a tokenizer, and this engine has none; "
                "drop `stop` or use a model directory with a tokenizer"
            )
        self._max_tokens = sampling.max_tokens
        self._ends = frozenset() if sampling.ignore_eos else eos_token_ids
        self._text: TextStream | None = None
        if tokenizer is not None and sampling.stop:
            context = request.prompt_token_ids
            self._text = TextStream(
                tokenizer, sampling.stop, context=context, min_tokens=sampling.min_tokens
            )
        self.adjustment = Adjustment.of(request, self._ends)
        self.num_tokens = 0

    def take(self, token_id: int) -> FinishReason | None:
        """Add a token; return why the answer ends with it, or None if it goes on."""
        self.num_tokens += 1
        if self.adjustment is not None:
            self.adjustment.take(token_id)
        if token_id in self._ends or self._completes_stop(token_id):
            return "stop"
        return "length" if self.num_tokens >= self._max_tokens else None

    def _completes_stop(self, token_id: int) -> bool:
        if self._text is None:
            return False
        self._text.push((token_id,))
        return self._text.stopped
