"""Sampling against a plain per-row computation in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayapp.engine.sampling import noise, sample
from rayapp.engine.sampling_params import SamplingParams
from tests.engine import earlier_sampling

GREEDY = SamplingParams()


def choose_tokens(logits, params, indices) -> list[int]:
    return sample(logits, params, indices)[0]


def plain_draw(logits: np.ndarray, params: SamplingParams, index: int) -> int:
    """The definition, one row at a time."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if params.top_k:
        order = order[: params.top_k]
    scaled = np.array([logits[i] for i in order]) / params.temperature
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    kept, mass = [], 0.0
    for weight in weights:
        kept.append(weight)
        mass += weight
        if mass >= params.top_p:
            break
    target, seen = noise(params.seed, index) * sum(kept), 0.0
    for token, weight in zip(order, kept, strict=False):
        seen += weight
        if target < seen:
            return token
    return order[len(kept) - 1]


def random_logits(rows: int, vocab: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_takes_the_best_and_ties_go_to_the_lowest_id():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 1.0, 0.0, 3.0]])
    assert choose_tokens(logits, [GREEDY, GREEDY], [0, 5]) == [1, 0]


@pytest.mark.parametrize("top_k", [0, 1, 7])
@pytest.mark.parametrize("top_p", [1.0, 0.6, 1e-9])
def test_draws_follow_the_definition(top_k, top_p):
    logits = random_logits(64)
    params = [
        SamplingParams(temperature=0.5 + row / 20, top_k=top_k, top_p=top_p, seed=row)
        for row in range(64)
    ]
    indices = [row * 3 for row in range(64)]
    expected = [
        plain_draw(row.double().numpy(), p, i)
        for row, p, i in zip(logits, params, indices, strict=True)
    ]
    assert choose_tokens(logits, params, indices) == expected


@pytest.mark.parametrize("sorted_first", [1, 3, 20])
def test_draws_from_the_likeliest_tokens_are_the_draws_from_all(sorted_first, monkeypatch):
    """Flat and steep rows, ties across the border of what is sorted first, every kind of limit."""
    logits = random_logits(400, seed=5) * torch.linspace(0.05, 2, 400)[:, None]
    logits[::3] = logits[::3].round()
    params = [
        SamplingParams(
            temperature=(0.3, 1.0, 4.0)[row % 3],
            top_k=(0, 0, 2, 30)[row % 4],
            top_p=(1.0, 0.5, 0.95, 0.999, 1e-6)[row % 5],
            seed=row,
        )
        for row in range(400)
    ]
    indices = list(range(400))
    monkeypatch.setattr("rayapp.engine.sampling._SORTED_FIRST", 50)
    whole = choose_tokens(logits, params, indices)
    monkeypatch.setattr("rayapp.engine.sampling._SORTED_FIRST", sorted_first)
    assert choose_tokens(logits, params, indices) == whole
    expected = [
        plain_draw(row.double().numpy(), p, i)
        for row, p, i in zip(logits, params, indices, strict=True)
    ]
    assert whole == expected


def test_rows_do_not_influence_each_other():
    logits = random_logits(12)
    params = [
        SamplingParams(temperature=row % 3, top_k=row % 4, top_p=1 - row / 20, seed=row)
        for row in range(12)
    ]
    indices = list(range(12))
    together = choose_tokens(logits, params, indices)
    order = torch.randperm(12).tolist()
    shuffled = choose_tokens(logits[order], [params[r] for r in order], order)
    alone = [choose_tokens(logits[r : r + 1], [params[r]], [r])[0] for r in range(12)]
    assert together == alone
    assert [together[r] for r in order] == shuffled


def test_frequencies_follow_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -5.0]])
    count = 4000
    params = [SamplingParams(temperature=2.0, seed=9)] * count
    drawn = choose_tokens(logits.expand(count, -1), params, list(range(count)))
    found = np.bincount(drawn, minlength=4) / count
    expected = (logits[0] / 2.0).softmax(-1).numpy()
    assert np.abs(found - expected).max() < 0.03


def test_noise_depends_on_seed_and_index_alone():
    assert noise(3, 5) == noise(3, 5)
    values = {noise(seed, index) for seed in range(20) for index in range(20)}
    assert len(values) == 400
    assert all(0 <= value < 1 for value in values)
    assert noise(2**63 - 1, 10**9) >= 0


def test_a_tiny_temperature_is_greedy():
    logits = random_logits(5)
    cold = [SamplingParams(temperature=1e-300, seed=row) for row in range(5)]
    assert choose_tokens(logits, cold, [0] * 5) == logits.argmax(-1).tolist()


def test_temperature_does_not_touch_the_logprobs():
    logits = random_logits(3)
    params = [
        SamplingParams(temperature=2.0, logprobs=0),
        GREEDY,
        SamplingParams(temperature=0.1, logprobs=4),
    ]
    tokens, entries = sample(logits, params, [0, 0, 0])
    expected = logits.double().log_softmax(-1)
    assert entries[0].logprob == pytest.approx(expected[0, tokens[0]].item(), abs=1e-12)
    assert entries[0].top == ()
    assert entries[1] is None
    assert [token for token, _ in entries[2].top] == expected[2].topk(4).indices.tolist()


def test_the_best_alternative_is_the_same_float():
    logits = random_logits(1).bfloat16()
    (best,), (entry,) = sample(logits, [SamplingParams(logprobs=1)], [0])
    assert entry.top == ((best, entry.logprob),)


@pytest.mark.parametrize("sorted_first", [2, 25, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_and_logprobs_are_those_of_the_earlier_sampling(dtype, sorted_first, monkeypatch):
    """Greedy and drawn rows side by side, ties, every limit, and more alternatives than tokens."""
    monkeypatch.setattr("rayapp.engine.sampling._SORTED_FIRST", sorted_first)
    logits = random_logits(240, vocab=18 if sorted_first == 2 else 300, seed=7).to(dtype)
    logits[::4] = logits[::4].round()
    logits[5] = 1.0
    params = [
        SamplingParams(
            temperature=(0.0, 0.4, 1.0, 5.0)[row % 4],
            top_k=(0, 1, 5, 25, 290)[row % 5],
            top_p=(1.0, 0.9, 0.3)[row % 3],
            logprobs=(None, 0, 3, 20)[row // 2 % 4],
            seed=row,
        )
        for row in range(240)
    ]
    indices = list(range(240))
    expected = earlier_sampling.choose_tokens(logits, params, indices)
    tokens, entries = sample(logits, params, indices)
    assert tokens == expected
    assert entries == earlier_sampling.token_logprobs(logits, tokens, params)


def test_one_transfer_brings_everything_over(monkeypatch):
    logits, transfers = random_logits(6, vocab=600), []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: transfers.append(len(x)) or real(x))
    mixed = [
        SamplingParams(temperature=row % 2, top_k=9, logprobs=row, seed=row) for row in range(6)
    ]
    for params in ([GREEDY] * 6, mixed):
        sample(logits, params, [0] * 6)
    assert transfers == [6, 2 * 6 + 6 * (2 + 2 * 5)]
