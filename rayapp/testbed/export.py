"""A trained network as a Hugging Face directory: bf16 weights, tokenizer, configuration."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from rayapp.testbed.network import MATRICES, Shape, Weights
from rayapp.testbed.tokens import END_ID, PAD_ID, byte_tokenizer

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama_config(shape: Shape) -> LlamaConfig:
    """The configuration of the model that ``shape`` describes."""
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.num_blocks,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        dtype=torch.bfloat16,
    )


def llama_state(weights: Weights) -> Weights:
    """The stacked weights under Llama's names, without the output head, which is the embedding."""
    state = {
        "model.embed_tokens.weight": weights["embed_tokens"],
        "model.norm.weight": weights["norm"],
    }
    for name in (*MATRICES, "input_layernorm", "post_attention_layernorm"):
        part = "self_attn." if name in _ATTENTION else "mlp." if name in MATRICES else ""
        for index, weight in enumerate(weights[name].unbind(0)):
            state[f"model.layers.{index}.{part}{name}.weight"] = weight
    return {name: weight.detach().clone() for name, weight in state.items()}


def llama_model(weights: Weights, shape: Shape) -> LlamaForCausalLM:
    """The trained network as transformers' own model, fp32."""
    model = LlamaForCausalLM(llama_config(shape)).float().eval()
    model.load_state_dict(llama_state(weights), strict=False)
    model.tie_weights()
    return model


def settle(directory: Path) -> None:
    """Name the tokenizer's class as every release of transformers knows it; make files readable."""
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for file in directory.iterdir():
        file.chmod(0o644)


def export_checkpoint(weights: Weights, shape: Shape, directory: Path | str) -> None:
    """Write the model in bf16 with its tokenizer, for ``AutoModelForCausalLM.from_pretrained``.

    Args:
        weights: fp32 weights of a run.
        shape: Sizes of the network.
        directory: The directory of the files; made if missing, files of the same names replaced.
    """
    model = llama_model(weights, shape).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=END_ID, pad_token_id=PAD_ID
    )
    model.save_pretrained(directory)
    byte_tokenizer(shape.max_positions).save_pretrained(directory)
    settle(Path(directory))
