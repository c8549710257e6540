"""Load a checkpoint, or only the tensors that one stage of a plan runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from accelerate import infer_auto_device_map, init_empty_weights
from accelerate.utils import get_balanced_memory, set_module_tensor_to_device
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from rayapp.errors import ModelError
from rayapp.models.architecture import DTYPES, MULTIMODAL_TYPES, compute_dtype
from rayapp.models.blocks import apply_modes, find_decoder
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.fingerprints.fingerprint import canonical_name
from rayapp.models.formats.quantised import check_plain
from rayapp.models.healed import HealedWeights, attach, attached_bytes
from rayapp.models.products.stages import pack_stages
from rayapp.models.tokenizer import load_tokenizer
from rayapp.plan import STAGES, ModelSignature, PruningPlan, Stage
from rayapp.settings import DType

logger = logging.getLogger(__name__)

Part = Literal["prefill", "decode", "unified"]


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory; tensors that its stage does not run stay empty, on the meta device.

    ``parameter_bytes`` counts the bytes that are held, tied tensors once; a packed copy of tied
    embeddings counts.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    signature: ModelSignature
    path: Path
    parameter_bytes: int

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer, from the generation configuration."""
        return eos_token_ids(self.model)


def eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Every token that ends an answer: the generation configuration's, or else the model's."""
    for config in (getattr(model, "generation_config", None), model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(ids)
    return ()


def load_model(
    path: str | Path,
    *,
    plan: PruningPlan | None = None,
    stage: Part | None = None,
    dtype: DType = "auto",
    device: str | torch.device = "cpu",
    packed: bool = False,
) -> LoadedModel:
    """Load a checkpoint and its tokenizer.

    With a ``stage``, only the tensors that this stage of ``plan`` runs are read (``unified``: the
    union of both stages), besides embeddings, final norm and head; the rest stays on the meta
    device and costs no memory. Healed tensors of the plan are read in place of the parameters that
    they replace. ``device="auto"`` spreads the blocks over all GPUs that the process sees.
    With ``packed``, weights are brought into the form in which the engines multiply
    (:mod:`rayapp.models.products`): the engines run faster, and modules that are called by
    themselves slower.

    Raises:
        ModelError: The directory is not a supported, complete safetensors checkpoint.
        PlanError: The plan was made for another model, or its healed tensors cannot be used.
    """
    checkpoint = Checkpoint(path)
    signature = checkpoint.signature()
    plan = plan or PruningPlan()
    plan.check_model(signature)
    tokenizer = load_tokenizer(path)
    model = empty_model(checkpoint.config, dtype)
    _read_generation_config(model, checkpoint.path)
    model.rayapp_fingerprint = signature.weights_fingerprint
    healed = HealedWeights.load(plan, stages_of(stage)) if plan.healed else None
    needed = needed_names(model, plan, stage, healed)
    _fill(model, checkpoint, needed, _placement(model, device))
    if healed:
        attach(model, healed)
    loaded = sum({p.data_ptr(): p.nbytes for p in model.parameters() if not p.is_meta}.values())
    loaded += attached_bytes(model)
    loaded += pack_stages(model, plan, stages_of(stage)) if packed else 0
    return LoadedModel(model, tokenizer, signature, Path(path), loaded)


def read_signature(path: str | Path) -> ModelSignature:
    """Read the signature of a checkpoint, see :meth:`Checkpoint.signature`."""
    return Checkpoint(path).signature()


def empty_model(config: PreTrainedConfig, dtype: DType = "auto") -> PreTrainedModel:
    """Build the model on the meta device; buffers that no checkpoint has (rotary ones) are real."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known; use auto, {', '.join(DTYPES)}")
    target = compute_dtype(config, dtype)
    multimodal = config.model_type in MULTIMODAL_TYPES
    auto_class = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    # Parameters have no memory yet, so initial values would be drawn for nothing.
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = auto_class.from_config(config, dtype=target, trust_remote_code=False)
    return model.eval()


def _read_generation_config(model: PreTrainedModel, path: Path) -> None:
    if (path / "generation_config.json").is_file():
        model.generation_config = type(model.generation_config).from_pretrained(path)


def stages_of(stage: Part | None) -> tuple[Stage, ...]:
    """The stages that a replica runs; both for a whole model."""
    return STAGES if stage in (None, "unified") else (cast("Stage", stage),)


def needed_names(
    model: PreTrainedModel, plan: PruningPlan, stage: Part | None, healed: HealedWeights | None
) -> set[str]:
    """Names of the parameters that a stage runs, as the full model calls them."""
    if stage is None:
        return {name for name, _ in model.named_parameters()}
    return {
        name
        for single_stage in stages_of(stage)
        for name in _run_names(apply_modes(model, plan, single_stage), single_stage)
        if healed is None or canonical_name(name) not in healed.stages[single_stage]
    }


def _run_names(staged: PreTrainedModel, stage: Stage) -> list[str]:
    """Names of the parameters that a stage runs; decode never sees an image, so no vision tower."""
    parts = [staged]
    if stage == "decode":
        parts = [find_decoder(staged), staged.get_output_embeddings()]
    run = {id(p) for part in parts for p in part.parameters()}
    return [name for name, p in staged.named_parameters() if id(p) in run]


def _placement(model: PreTrainedModel, device: str | torch.device) -> dict[str, torch.device]:
    """Map module name prefixes to devices: one for all, or blocks spread evenly over all GPUs."""
    if device != "auto" or torch.cuda.device_count() < 2:
        single = "cpu" if device == "auto" and not torch.cuda.is_available() else device
        return {"": torch.device("cuda" if single == "auto" else single)}
    whole = [type(find_decoder(model).layers[0]).__name__]
    memory = get_balanced_memory(model, no_split_module_classes=whole)
    spread = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    logger.info("device map: %s", spread)
    return {prefix: torch.device(target) for prefix, target in spread.items()}


def _device_of(name: str, placement: dict[str, torch.device]) -> torch.device:
    """Return the device of the longest prefix that covers ``name``."""
    prefixes = [p for p in placement if not p or name == p or name.startswith(f"{p}.")]
    return placement[max(prefixes, key=len)]


def _fill(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    needed: set[str],
    placement: dict[str, torch.device],
) -> None:
    """Read the needed tensors into the empty model, in its element type, and tie tied tensors."""
    keys = {canonical_name(key): key for key in checkpoint.names()}
    stored = {keys[c]: n for n in sorted(needed) if (c := canonical_name(n)) in keys}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, tensor in checkpoint.read(stored):
        name = stored[key]
        expected = parameters[name]
        check_plain(checkpoint.path, key, tensor)
        if tensor.shape != expected.shape:
            raise ModelError(
                f"{checkpoint.path}: tensor {name!r} has shape {tuple(tensor.shape)}, the "
                f"configuration says {tuple(expected.shape)}; config.json and weights do not "
                "belong together"
            )
        target = _device_of(name, placement)
        set_module_tensor_to_device(model, name, target, value=tensor, dtype=expected.dtype)
    model.tie_weights()
    missing = sorted(n for n, p in model.named_parameters() if p.is_meta and n in needed)
    if missing:
        raise ModelError(
            f"{checkpoint.path}: {len(missing)} tensors are missing (first: {missing[0]}); "
            "the checkpoint is incomplete or of another architecture"
        )
    _move_buffers(model, placement)


def _move_buffers(model: PreTrainedModel, placement: dict[str, torch.device]) -> None:
    """Move only buffers to their devices: parameters that were left out cannot be moved."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(_device_of(f"{prefix}.{name}".lstrip("."), placement)))
