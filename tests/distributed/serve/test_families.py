"""The oracle of the service for every family: two nodes, over HTTP, equal to ``model.generate``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.ray


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_served_answers_equal_generate(family, deploy, save_tiny, tmp_path):
    path = save_tiny(tmp_path, family)
    with deploy(model=str(path), max_num_seqs=6) as service:
        check_answers(service, path)


@pytest.mark.slow
def test_answers_of_a_deep_qwen3_equal_generate(elastic, deep_model):
    """Pools may grow meanwhile; ``rayapp serve`` is tried with the shipped model."""
    check_answers(elastic, deep_model)


def check_answers(service, path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = [
        [32 + (7 * n + 3 * i + i * i) % 90 for i in range(1 + (n * 37) % 120)] for n in range(16)
    ]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda p: service.complete(p, max_tokens=16), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == dense_text(model, tokenizer, prompt)
    service.check_idle()


def dense_text(model, tokenizer, prompt):
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
    )
    return tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
