from __future__ import annotations

import torch

from rayapp.pruning.evaluator.state_cache import StateCache


def state(value: float = 0.0, numbers: int = 25) -> tuple[torch.Tensor, ...]:
    return (torch.full((numbers,), float(value)),)


def test_least_recently_used_goes_first_and_dense_last():
    cache = StateCache(300)
    cache.put("dense", state(1), dense=True)
    cache.put("a", state(2))
    cache.put("b", state(3))
    assert cache.nbytes == 300
    assert cache.get("a") is not None  # now b is the oldest
    cache.put("c", state(4))
    assert cache.get("b") is None
    assert [cache.get(key)[0][0].item() for key in ("dense", "a", "c")] == [1, 2, 4]
    cache.put("d", state(5))
    cache.put("e", state(6))
    assert cache.get("dense") is not None
    assert cache.nbytes == 300


def test_others_never_push_out_the_dense_model():
    cache = StateCache(200)
    cache.put("one", state(), dense=True)
    cache.put("two", state(), dense=True)
    cache.put("other", state())
    assert cache.get("other") is None
    cache.put("three", state(), dense=True)
    assert cache.get("one") is None


def test_what_is_too_large_is_not_kept_and_views_count_whole():
    cache = StateCache(100)
    cache.put("large", state(numbers=26))
    cache.put("view", (torch.zeros(1000)[:1],))
    assert cache.nbytes == 0
