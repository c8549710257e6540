"""The shipped directory: small, bf16, ordinary, and right."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rayapp.errors import InputError
from rayapp.testbed import text_model_path
from rayapp.testbed.score import score
from rayapp.testbed.tasks import TASKS, Example, generate
from rayapp.testbed.tokens import END_ID, PAD_ID


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(text_model_path()).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(text_model_path())


def test_directory_is_small_and_whole() -> None:
    files = {path.name: path.stat().st_size for path in text_model_path().iterdir()}
    assert sum(files.values()) <= 5_000_000
    assert {"README.md", "config.json", "generation_config.json", "tokenizer.json"} <= set(files)


def test_weights_on_disk_are_bf16_and_tied() -> None:
    with safe_open(text_model_path() / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "lm_head.weight" not in names


def test_model_is_an_ordinary_llama_of_twelve_blocks(model) -> None:
    assert type(model) is LlamaForCausalLM
    assert model.config.num_hidden_layers == len(model.model.layers) == 12
    assert model.dtype == torch.bfloat16
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.max_position_embeddings >= 1024
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.eos_token_id, model.config.pad_token_id) == (END_ID, PAD_ID)
    assert model.generation_config.eos_token_id == END_ID


def test_token_ids_equal_bytes(tokenizer) -> None:
    text = "qk=wev  add:47+85\n\tNaïve ☃?\n" + "".join(map(chr, range(128)))
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([104, 105, END_ID, PAD_ID], skip_special_tokens=True) == "hi"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END_ID, PAD_ID)
    assert tokenizer.bos_token_id is None


def test_chat_template_renders_the_prompt(tokenizer) -> None:
    prompt = generate("sort", "test", 1, 0)[0].prompt
    user = {"role": "user", "content": prompt.removesuffix("\n")}
    rendered = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    assert rendered == prompt
    ids = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
    assert ids == list(prompt.encode())


def test_chat_template_renders_a_conversation_as_training_rows(tokenizer) -> None:
    turns = [
        {"role": "system", "content": "kd=wxy"},
        {"role": "user", "content": "kd?"},
        {"role": "assistant", "content": "wxy"},
        {"role": "user", "content": "kd?"},
    ]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert ids == [*b"kd=wxy\nkd?\nwxy", END_ID, *b"kd?\n"]


def of_few_lengths(task: str, length: str, sizes: range, count: int) -> list[Example]:
    """Test questions of similar lengths, which share batches; the length says nothing of the
    answer.
    """
    drawn = generate(task, "test", count, 0, length=length)
    return [example for example in drawn if len(example.prompt) in sizes]


@pytest.mark.parametrize("task", TASKS)
def test_held_out_questions_are_answered(model, tokenizer, task: str) -> None:
    examples = of_few_lengths(task, "short", range(116, 127), 250)[:20]
    assert len(examples) >= 16
    assert score(model, tokenizer, examples) >= 0.9


@pytest.mark.slow
def test_evidence_is_found_in_long_prompts(model, tokenizer) -> None:
    examples = [
        example for task in TASKS for example in of_few_lengths(task, "long", range(398, 402), 200)
    ]
    assert len(examples) >= 8
    assert score(model, tokenizer, examples) >= 0.9


def test_score_counts_only_answers_that_end_right(model, tokenizer) -> None:
    right = generate("copy", "test", 4, 0, length="short")
    cut = [Example(example.prompt, example.completion[:-1], "copy") for example in right]
    wrong = [Example(example.prompt, "zzzzz", "copy") for example in right]
    assert score(model, tokenizer, [*right, *cut, *wrong]) == pytest.approx(1 / 3)
    with pytest.raises(InputError, match="at least one"):
        score(model, tokenizer, [])
