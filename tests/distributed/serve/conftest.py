"""Services under a plan with everything in it, and one that scales, each with its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rayapp.engine.local import LocalPipeline
from rayapp.models.blocks import signature_of
from rayapp.models.healed import HealedWeights
from rayapp.models.loading import LoadedModel, load_model
from rayapp.plan import PruningPlan
from rayapp.vision.llava import load_image_processor
from tests.clusters import Deployed
from tests.services import LEASE_S, Services

MODES = {
    "prefill": {"0": "attention_only", "1": "mlp_and_kv", "2": "kv_only", "3": "mlp_only",
                "4": "removed", "5": "full"},
    "decode": {"0": "attention_only", "2": "full", "3": "mlp_only", "4": "removed"},
}  # fmt: skip
TRANSFER = {"0": {"first": 2, "last": 0.5}, "1": {"first": 1, "last": 6, "encoding": "int8"}}
NUM_VISUAL = 6
QUICK_SCALING = {
    "targets": {"ttft_ms": 200, "tpot_ms": 20},
    "fast_s": 3.0,
    "slow_s": 6.0,
    "downscale_delay_s": 4.0,
    "interval_s": 0.5,
}


@dataclass(frozen=True)
class PlannedModel:
    """A checkpoint that takes images, and a plan with every mode and rule, and healed survivors."""

    path: Path
    loaded: LoadedModel
    bare: PruningPlan
    plan: PruningPlan
    plan_path: Path

    @classmethod
    def made(cls, path: Path, first_token: str, directory: Path) -> PlannedModel:
        """Write the plan for a checkpoint of six blocks."""
        loaded = load_model(path, dtype="float32")
        healed = HealedWeights.of(_scaled(loaded.model))
        healed.save(directory)
        bare = PruningPlan.model_validate(
            {
                **{stage: {"blocks": blocks} for stage, blocks in MODES.items()},
                "kv_transfer": TRANSFER,
                "visual_tokens": {"num_keep": NUM_VISUAL},
                "first_token": first_token,
                "model": signature_of(loaded.model).model_dump(),
            }
        )
        bare.with_healed(healed.digest).save(directory)
        return cls(path, loaded, bare, PruningPlan.load(directory), directory)

    def pipeline(self, plan: PruningPlan | None = None) -> LocalPipeline:
        """The reference in this process, under this plan or another one."""
        return LocalPipeline(
            self.loaded.model,
            self.loaded.tokenizer,
            self.plan if plan is None else plan,
            image_processor=load_image_processor(self.path),
        )

    @property
    def served(self) -> dict[str, Any]:
        """Options of a service of this model under its plan."""
        return {
            "model": str(self.path),
            "plan": str(self.plan_path),
            "max_num_seqs": 4,
            "max_waiting": 40,
            "max_num_batched_tokens": 64,
            "kv_part_ms": 0.0,  # KV leaves as it is made.
            "deadlines": {"lease_s": LEASE_S},
        }


def _scaled(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """A survivor of each stage whose tensors are not the model's."""
    layers = model.get_decoder().layers
    return {
        stage: {
            f"layers.{block}.{name}": p.detach() * scale
            for name, p in layers[block].named_parameters()
            if "mlp" in name or "o_proj" in name
        }
        for stage, block, scale in (("prefill", 5, 1.2), ("decode", 1, 0.8))
    }


@pytest.fixture(scope="session")
def planned_model(
    tiny_llava_path: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> PlannedModel:
    """What ``planned`` serves; decode makes the first token."""
    home = tmp_path_factory.mktemp("planned")
    path = tiny_llava_path(home / "model", "llava", num_hidden_layers=6)
    return PlannedModel.made(path, "decode", home / "plan")


@pytest.fixture(scope="session")
def unified_model(
    tiny_llava_path: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> PlannedModel:
    """What ``unified`` serves; prefill makes the first token."""
    home = tmp_path_factory.mktemp("unified")
    path = tiny_llava_path(home / "model", "llava_next", num_hidden_layers=6)
    return PlannedModel.made(path, "prefill", home / "plan")


@pytest.fixture(scope="module")
def planned(services: Services, planned_model: PlannedModel) -> Deployed:
    """The plan with everything in it, on one replica for each stage."""
    return services.get(**planned_model.served)


@pytest.fixture(scope="module")
def unified(services: Services, unified_model: PlannedModel) -> Deployed:
    """The plan with everything in it, both stages on one replica."""
    return services.get(mode="unified", **unified_model.served)


@pytest.fixture(scope="session")
def deep_model(save_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``elastic`` serves: a small model that computes for a while."""
    return save_tiny(tmp_path_factory.mktemp("deep"), "qwen3", num_hidden_layers=24)


@pytest.fixture(scope="module")
def elastic(services: Services, deep_model: Path) -> Deployed:
    """The dense model on pools that grow and shrink quickly."""
    return services.get(
        model=str(deep_model),
        max_num_seqs=2,
        prefill={"replicas": "1:2", "labels": {"role": "prefill"}},
        decode={"replicas": "1:2", "labels": {"role": "decode"}},
        scaling=QUICK_SCALING,
    )
