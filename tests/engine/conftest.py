"""Oracles of the engine: an independent masked full-sequence computation, and plans for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import PreTrainedModel

from rayapp.engine.decode import DecodeEngine
from rayapp.engine.prefill import PrefillEngine
from rayapp.engine.request import GenerationRequest, TokenBatch
from rayapp.models.blocks import signature_of
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan

EOS = 256


class Reference:
    """Logits of a plan from full attention matrices: no cache, no segment, nothing of the engine.

    Every token runs through every block once; a token's stage decides which parts it computes, and
    a matrix per block says which tokens it sees. Float64.
    """

    def __init__(self, model: PreTrainedModel, plan: PruningPlan) -> None:
        self.config, self.plan = model.config, plan
        self.weights = {name: p.detach().double() for name, p in model.state_dict().items()}

    def answer_logits(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        num_prefilled = len(prompt) - (self.plan.first_token == "decode")
        tokens = torch.tensor([*prompt, *answer][:-1])
        hidden = self.weights["model.embed_tokens.weight"][tokens]
        for block in range(self.config.num_hidden_layers):
            hidden = self._block(hidden, block, num_prefilled)
        normed = self._norm(hidden[len(prompt) - 1 :], "model.norm.weight")
        return normed @ self.weights["lm_head.weight"].T

    def _block(self, hidden: torch.Tensor, block: int, num_prefilled: int) -> torch.Tensor:
        prefix = f"model.layers.{block}."
        modes = [
            self.plan.mode("prefill" if i < num_prefilled else "decode", block)
            for i in range(len(hidden))
        ]
        attended = self._attention(hidden, prefix, self._sees(len(hidden), block, num_prefilled))
        attends = torch.tensor([float(mode.attends) for mode in modes]).double()
        hidden = hidden + attends[:, None] * attended
        normed = self._norm(hidden, prefix + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(self._linear(normed, prefix + "mlp.gate_proj"))
        up = self._linear(normed, prefix + "mlp.up_proj")
        has_mlp = torch.tensor([float(mode.has_mlp) for mode in modes]).double()
        return hidden + has_mlp[:, None] * self._linear(gate * up, prefix + "mlp.down_proj")

    def _attention(self, hidden: torch.Tensor, prefix: str, sees: torch.Tensor) -> torch.Tensor:
        normed = self._norm(hidden, prefix + "input_layernorm.weight")
        query, key, value = (
            self._linear(normed, f"{prefix}self_attn.{name}_proj").unflatten(
                -1, (-1, self.head_dim)
            )
            for name in "qkv"
        )
        if prefix + "self_attn.q_norm.weight" in self.weights:
            query = self._norm(query, prefix + "self_attn.q_norm.weight")
            key = self._norm(key, prefix + "self_attn.k_norm.weight")
        query, key = self._rotate(query), self._rotate(key)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * self.head_dim**-0.5
        weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, value)
        return self._linear(mixed.flatten(1), prefix + "self_attn.o_proj")

    def _sees(self, length: int, block: int, num_prefilled: int) -> torch.Tensor:
        kinds = getattr(self.config, "layer_types", None)
        sliding = self.config.model_type == "mistral" if kinds is None else "slid" in kinds[block]
        window = self.config.sliding_window if sliding else length + 1
        held = list(range(num_prefilled))[-(window - 1) :] if window > 1 else []
        first, last = self.plan.transfer(block).counts(len(held))
        kept = {*held[:first], *held[len(held) - last :]}
        sees = torch.zeros(length, length, dtype=torch.bool)
        for q in range(length):
            for k in range(q + 1):
                travelled = q < num_prefilled or k >= num_prefilled or k in kept
                sees[q, k] = travelled and q - k < window
        return sees

    @property
    def head_dim(self) -> int:
        return self.config.head_dim if getattr(self.config, "head_dim", None) else 12

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        theta = self.config.rope_parameters["rope_theta"]
        half = self.head_dim // 2
        frequency = theta ** (-torch.arange(half).double() / half)
        angle = (torch.arange(len(x)).double()[:, None] * frequency)[:, None]
        one, two = x[..., :half], x[..., half:]
        return torch.cat(
            [one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1
        )

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt()
        return x * scale * self.weights[name]

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.weights[name + ".weight"].T + self.weights.get(name + ".bias", 0.0)


@pytest.fixture(scope="session")
def reference() -> type[Reference]:
    """``reference(model, plan).answer_logits(prompt, answer)``."""
    return Reference


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., PruningPlan]:
    """``make_plan(model, prefill={block: mode}, decode=..., kv_transfer=..., first_token=...)``."""

    def make(model, *, prefill=None, decode=None, kv_transfer=None, first_token="prefill"):
        return PruningPlan.model_validate(
            {
                "model": signature_of(model).model_dump(),
                "first_token": first_token,
                "prefill": {"blocks": prefill or {}},
                "decode": {"blocks": decode or {}},
                "kv_transfer": kv_transfer or {},
            }
        )

    return make


class Engines:
    """Both engines of one plan, and the answers collected from them."""

    def __init__(
        self, model, plan=None, *, tokenizer=None, max_num_seqs=4, max_model_len=96
    ) -> None:
        self.plan = plan or PruningPlan()
        limits = {"max_model_len": max_model_len, "eos_token_ids": (EOS,), "tokenizer": tokenizer}
        self.prefill = PrefillEngine(BlockStack(model, self.plan, "prefill"), self.plan, **limits)
        self.decode = DecodeEngine(
            BlockStack(model, self.plan, "decode"), self.plan, max_num_seqs=max_num_seqs, **limits
        )
        self.answers: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}

    def start(self, request: GenerationRequest, replay: Sequence[int] = ()) -> None:
        """Prefill and admit one request."""
        output = self.prefill.run(request)
        self.answers.setdefault(request.request_id, [])
        if output.first is not None and not replay:
            self.take(output.first)
        if not output.finished:
            self.decode.admit(request, output.segment, output.first, replay)

    def take(self, batch: TokenBatch) -> None:
        answer = self.answers[batch.request_id]
        assert batch.first_index == len(answer)
        answer.extend(batch.token_ids)
        if batch.finish_reason:
            self.reasons[batch.request_id] = batch.finish_reason

    def step(self) -> None:
        for batch in self.decode.step():
            self.take(batch)
        self.decode.check_integrity()

    def drain(self) -> None:
        while self.decode.num_running:
            self.step()
        assert self.decode.usage == 0.0


@pytest.fixture(scope="session")
def engines() -> type[Engines]:
    """``engines(model, plan)``: a prefill and a decode engine side by side."""
    return Engines
