"""Bytes that a plan's transfer rules send on a calibration set, as the ledger will count them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from transformers import PreTrainedConfig

from rayapp.kv.forecast import RunPrompt, forecast_envelope, forecast_sizes
from rayapp.kv.ledger import KVShape
from rayapp.models.architecture import compute_dtype
from rayapp.plan import KVTransfer, PruningPlan


class KVBytes:
    """Bytes that prompts send under any rules, headers and scales included.

    Args:
        config: The model's configuration.
        plan: The plan whose modes say which KV travels; its transfer rules are replaced.
        prompts: The part of every prompt that prefill runs; a number stands for a text of so many
            tokens.

    Attributes:
        full: Bytes of the dense model's caches of these prompts.
    """

    def __init__(
        self, config: PreTrainedConfig, plan: PruningPlan, prompts: Iterable[int | RunPrompt]
    ) -> None:
        self._dtype = compute_dtype(config)
        self._shape = KVShape.of_config(config, self._dtype)
        self._plan = plan
        self._envelope = forecast_envelope(plan)
        self._prompts = Counter(map(_run_prompt, prompts))
        self._sent: dict[tuple[tuple[int, str], ...], int] = {}
        self.full = sum(count * self.dense(p.num_tokens) for p, count in self._prompts.items())

    def sent(self, rules: Mapping[int, KVTransfer]) -> int:
        """Bytes of all messages under ``rules``, given by block."""
        key = _key(rules)
        if key not in self._sent:
            self._sent[key] = sum(
                count * self.message(rules, prompt) for prompt, count in self._prompts.items()
            )
        return self._sent[key]

    def message(self, rules: Mapping[int, KVTransfer], prompt: int | RunPrompt) -> int:
        """Bytes of one message under ``rules``."""
        plan = self._plan.model_copy(update={"kv_transfer": dict(rules)})
        run = _run_prompt(prompt)
        return forecast_sizes(self._shape, self._dtype, plan, self._envelope, run).total_bytes

    def dense(self, num_prompt_tokens: int) -> int:
        """Bytes of the dense model's cache of one prompt."""
        return self._shape.dense_bytes(num_prompt_tokens)


def _run_prompt(prompt: int | RunPrompt) -> RunPrompt:
    return RunPrompt(prompt) if isinstance(prompt, int) else prompt


def _key(rules: Mapping[int, KVTransfer]) -> tuple[tuple[int, str], ...]:
    return tuple((block, rules[block].model_dump_json()) for block in sorted(rules))
