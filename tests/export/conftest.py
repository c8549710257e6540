"""Plans of a checkpoint, and the logits to compare: a stage's here, a directory's elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from rayapp.models.loading import load_model, read_signature
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan

# Longer than mistral's window of 12, so that a wrong mask shows.
IDS = torch.arange(3, 43)[None]
Blocks = Mapping[int, str] | Iterable[int]


class Recorder:
    """A cache that keeps nothing: the whole sequence is run at once."""

    def update(self, keys, values, block):
        return keys, values


@torch.no_grad()
def compute_stage_logits(path: Path, plan: PruningPlan, stage: str) -> torch.Tensor:
    """Our stack over the whole sequence."""
    stack = BlockStack(load_model(path, plan=plan, stage=stage).model, plan, stage)
    positions = torch.arange(IDS.shape[1])[None]
    return stack.logits(stack.run(stack.embed(IDS), positions, Recorder()))


@torch.no_grad()
def compute_plain_logits(path: Path, auto: Any = AutoModelForCausalLM) -> torch.Tensor:
    return auto.from_pretrained(path).eval()(IDS).logits


def modes(blocks: Blocks) -> dict[int, str]:
    """Modes by block; a bare list is of removed ones."""
    return blocks if isinstance(blocks, dict) else dict.fromkeys(blocks, "removed")


def make_plan(path: Path, prefill: Blocks = (), decode: Blocks = (), **more: Any) -> PruningPlan:
    return PruningPlan.model_validate(
        {
            "model": read_signature(path),
            "prefill": {"blocks": modes(prefill)},
            "decode": {"blocks": modes(decode)},
            **more,
        }
    )


def list_tensors(directory: Path) -> dict[str, str]:
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file.name)
    return found


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """The sequence that logits are of, [1, T]."""
    return IDS


@pytest.fixture(scope="session")
def stage_logits() -> Callable[[Path, PruningPlan, str], torch.Tensor]:
    """``stage_logits(path, plan, stage)``: of this project's own stack, [1, T, V]."""
    return compute_stage_logits


@pytest.fixture(scope="session")
def plain_logits() -> Callable[..., torch.Tensor]:
    """``plain_logits(path, auto=AutoModelForCausalLM)``: of transformers alone, [1, T, V]."""
    return compute_plain_logits


@pytest.fixture(scope="session")
def plan_for() -> Callable[..., PruningPlan]:
    """``plan_for(path, prefill, decode, **fields)``; blocks are ``{block: mode}`` or removed."""
    return make_plan


@pytest.fixture(scope="session")
def names_in() -> Callable[[Path], dict[str, str]]:
    """``names_in(directory)``: the file of every tensor."""
    return list_tensors
