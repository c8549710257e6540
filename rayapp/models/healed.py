"""Healed tensors replace parameters of one stage, or add to them, and lie beside their plan.

A plan directory has only the tensors that healing changed, as an adapter directory does. Their
names are ``prefill.`` or ``decode.`` and the parameter's canonical name; the plan has the digest of
all of them. On a model they are kept by that digest, beside its own parameters, so that several
plans live over one model. A span of removed blocks may have a tensor of its own, its bridge.
Shapes: B = batch, T = tokens, E = hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from rayapp.errors import PlanError
from rayapp.models.fingerprints.fingerprint import canonical_name
from rayapp.models.products.joined import named_weights
from rayapp.models.products.packed import can_pack_weight, packed_weight
from rayapp.plan import HEALED_FILE, STAGES, PruningPlan, Stage

Tensors = Mapping[str, torch.Tensor]
_BLOCKS = "layers"

BRIDGE = "bridge"
"""Name of the map in its block, which is the last one of the span."""


def normalised(hidden_BTE: torch.Tensor, epsilon: float) -> torch.Tensor:
    """States of root mean square 1, in float32: what all norms of a span's blocks rescale."""
    wide = hidden_BTE.to(torch.float32)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)


class Bridge(nn.Module):
    """A linear map in place of a span of blocks that a stage does not run.

    It reads the state that entered the span, and estimates the dense model's state behind it.
    ReplaceMe (arXiv:2505.02819) maps the residual itself; here the map reads the normalised
    residual and adds to it, as every block does, so that a few tokens with huge states do not
    decide it (project default).

    Args:
        size: Hidden size.
        epsilon: The epsilon of the model's norms.
    """

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(size, size, device="meta"), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size, device="meta"), requires_grad=False)

    def forward(self, hidden_BTE: torch.Tensor) -> torch.Tensor:
        """The states behind the span, ``(B, T, E)``."""
        normed_BTE = normalised(hidden_BTE, self.epsilon).to(hidden_BTE.dtype)
        return hidden_BTE + functional.linear(normed_BTE, self.weight, self.bias)


@dataclass(frozen=True)
class HealedWeights:
    """Healed tensors by stage and canonical parameter name (``layers.3.mlp.up_proj.weight``).

    ``digest`` is that of all stages, even if only one was read.
    """

    digest: str
    stages: Mapping[Stage, Tensors]

    @classmethod
    def of(cls, stages: Mapping[Stage, Tensors]) -> HealedWeights:
        """Make healed weights from tensors in memory, and compute their digest."""
        digest = hashlib.sha256()
        for name, tensor in sorted(_named(stages).items()):
            _update(digest, name, tensor)
        return cls(digest.hexdigest()[:24], stages)

    @classmethod
    def load(cls, plan: PruningPlan, stages: Sequence[Stage] = STAGES) -> HealedWeights:
        """Load the healed tensors of a plan for these stages, from the directory of the plan.

        Raises:
            PlanError: The file is missing, unreadable, or not the one that the plan names.
        """
        file = _file(plan)
        digest, kept = hashlib.sha256(), {stage: dict[str, torch.Tensor]() for stage in stages}
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in sorted(opened.keys()):
                    stage, _, parameter = name.partition(".")
                    tensor = opened.get_tensor(name)
                    _update(digest, name, tensor)
                    if stage in kept:
                        kept[cast("Stage", stage)][parameter] = tensor
        except (OSError, SafetensorError) as error:
            raise PlanError(
                f"{file}: cannot be read as safetensors ({error}); restore the file that was "
                "written with the plan, or search again"
            ) from None
        actual = digest.hexdigest()[:24]
        if actual != plan.healed:
            raise PlanError(
                f"{file}: holds tensors {actual}, the plan names {plan.healed}; restore the file "
                "that was written with the plan, or search again"
            )
        return cls(actual, kept)

    def dumps(self) -> bytes:
        """Write the content of ``weights.safetensors`` as bytes."""
        return save({name: tensor.contiguous() for name, tensor in _named(self.stages).items()})

    def save(self, directory: str | Path) -> Path:
        """Write the file that lies beside a plan, and return its path."""
        target = Path(directory) / HEALED_FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.dumps())
        return target


def attach(model: PreTrainedModel, healed: HealedWeights) -> None:
    """Keep healed tensors on the model, in its element type and on the device of their block.

    The model's own parameters do not change, and a second call with the same tensors does nothing.

    Raises:
        PlanError: A tensor belongs to another model: it is no parameter of a block, or has another
            shape.
    """
    known = _attached(model).setdefault(healed.digest, {})
    parameters = {canonical_name(name): p for name, p in named_weights(model)}
    for stage, tensors in healed.stages.items():
        if stage not in known:
            known[stage] = {n: _parameter(n, t, parameters) for n, t in tensors.items()}


def healed_parameters(model: PreTrainedModel, plan: PruningPlan, stage: Stage) -> Tensors:
    """Healed tensors of one stage of a plan, by the canonical name of those that they replace.

    They are parameters, or weights that :func:`keep_packed` packed. Tensors that were not attached
    are read from the directory of the plan.

    Raises:
        PlanError: The healed tensors are missing, or do not fit the plan or the model.
    """
    if plan.healed is None:
        return {}
    if stage not in _attached(model).get(plan.healed, {}):
        attach(model, HealedWeights.load(plan, (stage,)))
    return _attached(model)[plan.healed][stage]


def keep_packed(model: PreTrainedModel, plan: PruningPlan, stage: Stage) -> None:
    """Pack the healed weights of layers that a model keeps for one stage, in their place."""
    if plan.healed is None:
        return
    tensors = _attached(model)[plan.healed][stage]
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight") and can_pack_weight(tensor):
            tensors[name] = packed_weight(tensor)


def attached_bytes(model: PreTrainedModel) -> int:
    """Number of bytes of all healed tensors that the model keeps."""
    kept = (p for stages in _attached(model).values() for s in stages.values() for p in s.values())
    return sum(parameter.nbytes for parameter in kept)


def _attached(model: Any) -> dict[str, dict[Stage, dict[str, torch.Tensor]]]:
    """Healed tensors on the model, by digest and stage; copies of its modules share them."""
    if not hasattr(model, "rayapp_healed"):
        model.rayapp_healed = {}
    tensors: dict[str, dict[Stage, dict[str, torch.Tensor]]] = model.rayapp_healed
    return tensors


def _parameter(
    name: str, tensor: torch.Tensor, parameters: Mapping[str, torch.Tensor]
) -> nn.Parameter:
    like = _likeness(name, parameters)
    if like is None or not name.startswith(f"{_BLOCKS}."):
        raise PlanError(
            f"healed tensor {name!r} is of no block of the model; use the {HEALED_FILE} that was "
            "written with the plan"
        )
    shape, dtype = like
    if tensor.shape != shape:
        raise PlanError(
            f"healed tensor {name!r} has shape {tuple(tensor.shape)}, the model "
            f"{tuple(shape)}; use the {HEALED_FILE} that was written with the plan"
        )
    value = tensor.to(_device(name, parameters), dtype)
    return nn.Parameter(value, requires_grad=False)


def _likeness(
    name: str, parameters: Mapping[str, torch.Tensor]
) -> tuple[torch.Size, torch.dtype] | None:
    """Shape and type of a healed tensor; None if the model has no place for it.

    Beside its own parameters, a block has a place for those of a bridge.
    """
    if name in parameters:
        return parameters[name].shape, parameters[name].dtype
    block, _, rest = name.rpartition(".")
    norm = parameters.get(f"{block.removesuffix(f'.{BRIDGE}')}.input_layernorm.weight")
    if norm is None or not block.endswith(f".{BRIDGE}") or rest not in ("weight", "bias"):
        return None
    return torch.Size([*norm.shape] * (2 if rest == "weight" else 1)), norm.dtype


def _device(name: str, parameters: Mapping[str, torch.Tensor]) -> torch.device:
    """Device of the tensor's block, whose frozen parameters are there even if this one is not.

    A removed block has none, so its bridge lies where the nearest loaded block before it does, or
    where the embeddings are.
    """
    there = {
        int(n.split(".")[1]): p.device
        for n, p in parameters.items()
        if n.startswith(f"{_BLOCKS}.") and not p.is_meta
    }
    near = [block for block in sorted(there) if block <= int(name.split(".")[1])]
    if near:
        return there[near[-1]]
    rest = (p.device for n, p in parameters.items() if n.startswith("embed_") and not p.is_meta)
    return next(rest, torch.device("cpu"))


def _named(stages: Mapping[Stage, Tensors]) -> dict[str, torch.Tensor]:
    return {f"{stage}.{n}": t for stage, tensors in stages.items() for n, t in tensors.items()}


def _update(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)


def _file(plan: PruningPlan) -> Path:
    if plan.directory is None:
        raise PlanError(
            f"the plan's healed tensors {plan.healed} are nowhere: it was not read from a "
            "directory; use PruningPlan.load, or attach the tensors to the model first"
        )
    file = plan.directory / HEALED_FILE
    if not file.is_file():
        raise PlanError(
            f"{file}: is missing, but the plan beside it is healed; copy both files, or search "
            "again with --heal none"
        )
    return file
