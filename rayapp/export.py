"""Export of a plan and its model as an ordinary Hugging Face checkpoint, for tools without plans.

A checkpoint has no stages and no halves of blocks. So an export is one stage (or both, if they are
one and the same model), and every block must be whole or gone; the blocks that stay are numbered
anew. The decode stage of a multimodal model never sees an image and is exported as the
language model that it is.

Tensors are copied one by one from the source's files, so memory has one shard at most. No element
changes, and plain transformers gives the logits of the stage.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rayapp import __version__
from rayapp.errors import InputError, ModelError, PlanError
from rayapp.models.architecture import MULTIMODAL_TYPES, text_config
from rayapp.models.checkpoint import Checkpoint
from rayapp.models.fingerprints.fingerprint import canonical_name
from rayapp.models.formats.origin import read_origin
from rayapp.models.healed import BRIDGE, HealedWeights, Tensors
from rayapp.models.loading import Part, empty_model
from rayapp.models.renumber import fewer_blocks, name_before, renumbered
from rayapp.models.shards import MAX_SHARD_BYTES, appearing, check_free, write_shards
from rayapp.plan import (
    HEALED_FILE,
    SEND_ALL,
    STAGES,
    Mode,
    ModelSignature,
    PruningPlan,
    Stage,
)

logger = logging.getLogger(__name__)

RECORD_FILE = "rayapp_export.json"

Progress = Callable[[str, int, int], None]
"""Function that is called with the name of the work, and the numbers of done and of all steps."""

# Files beside weights and config.json that the exported model needs as well: the tokenizer in all
# its spellings, image processing, generation, and the terms of use.
_CARRIED_FILES = (
    "*token*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template*",
    "additional_chat_templates/*", "*processor_config.json", "generation_config.json",
    "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
# Settings that are not exported: custom code is never run, and a path is of another machine.
_DROPPED_KEYS = ("auto_map", "_name_or_path")


@dataclass(frozen=True)
class ExportRecord:
    """Record of the origin of an exported checkpoint, beside it as ``rayapp_export.json``.

    Attributes:
        rayapp_version: Version of rayapp that exported.
        stage: Stage of the plan that was exported.
        plan_fingerprint: Fingerprint of the plan.
        healed: Digest of the plan's healed tensors, those of this stage being in the checkpoint.
        source: Signature of the model that the plan was applied to.
        kept_blocks: Number in the source of every block of the checkpoint.
        removed_blocks: Blocks of the source that are gone.
        not_carried: Sentences on parts of the plan that a checkpoint cannot express.
    """

    rayapp_version: str
    stage: Part
    plan_fingerprint: str
    healed: str | None
    source: ModelSignature
    kept_blocks: tuple[int, ...]
    removed_blocks: tuple[int, ...]
    not_carried: tuple[str, ...]

    def dumps(self) -> str:
        """Return the record as human-readable JSON text."""
        return json.dumps(asdict(self) | {"source": self.source.model_dump()}, indent=2) + "\n"


@dataclass(frozen=True)
class _Tensor:
    """A tensor to export: its name in the source, its name and shape in the export.

    ``healed`` is the tensor that replaces the source's, if the plan has one.
    """

    source: str
    name: str
    shape: torch.Size
    healed: torch.Tensor | None


def _silent(_what: str, _done: int, _total: int) -> None:
    """Ignore progress; nobody watches it."""


def export_stage(
    model: str | Path,
    plan: PruningPlan | str | Path,
    stage: Part,
    out: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = _silent,
) -> ExportRecord:
    """Write one stage of a plan as a checkpoint that ``from_pretrained`` loads.

    After this call ``out`` is either complete or does not exist.

    Args:
        model: The checkpoint directory that the plan was made for.
        plan: A plan, its file or its directory.
        stage: ``prefill``, ``decode``, or ``unified``: the one model that both stages are.
        out: Directory to make; it may exist, but only empty.
        max_shard_bytes: Tensors of one file at most; a larger tensor has a file of its own.
        progress: Called after every tensor.

    Raises:
        PlanError: The stage keeps parts of blocks, the stages differ (``unified``), no block is
            left, healed tensors cannot be used, or the plan was made for another model.
        ModelError: The model directory is not a supported, complete safetensors checkpoint.
        InputError: ``out`` is in use or cannot be written.
    """
    chosen = plan if isinstance(plan, PruningPlan) else PruningPlan.load(plan)
    checkpoint, target = Checkpoint(model), Path(out).resolve()
    signature = checkpoint.signature()
    chosen.check_model(signature)
    kept = kept_blocks(chosen, stage, signature.num_blocks)
    healed = _healed(chosen, stage)
    _check_expressible(healed, stage)
    check_free(target)
    record = ExportRecord(
        rayapp_version=__version__,
        stage=stage,
        plan_fingerprint=chosen.fingerprint,
        healed=chosen.healed,
        source=signature,
        kept_blocks=kept,
        removed_blocks=tuple(b for b in range(signature.num_blocks) if b not in kept),
        not_carried=tuple(_not_carried(chosen, stage, checkpoint)),
    )
    try:
        with appearing(target) as directory:
            _write_config(checkpoint, record, directory)
            _copy_files(checkpoint.path, directory)
            tensors = _read(checkpoint, _tensors(checkpoint, record, directory, healed), progress)
            write_shards(directory, tensors, max_shard_bytes=max_shard_bytes)
            (directory / RECORD_FILE).write_text(record.dumps(), encoding="utf-8")
            _write_origin(checkpoint.path, record, directory)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{out}: cannot be written ({reason}); give another --out") from None
    for sentence in record.not_carried:
        logger.warning("the checkpoint does not carry %s", sentence)
    return record


def _write_origin(source: Path, record: ExportRecord, directory: Path) -> None:
    """Say of the export what is known of its source, so that its results repeat the caption."""
    origin = read_origin(source)
    if origin is None:
        return
    what = "both stages" if record.stage == "unified" else f"the {record.stage} stage"
    caption = f"{what} of {origin.caption} under plan {record.plan_fingerprint}"
    fingerprint = Checkpoint(directory).signature().weights_fingerprint
    origin.derived(caption, fingerprint, directory).write(directory)


def kept_blocks(plan: PruningPlan, stage: Part, num_blocks: int) -> tuple[int, ...]:
    """Blocks of a checkpoint of ``stage``; a :class:`PlanError` if it cannot be exported."""
    stages: tuple[Stage, ...] = STAGES if stage == "unified" else (stage,)
    for run_stage in stages:
        _check_whole(
            plan, run_stage, num_blocks, "--shared" if len(stages) == 2 else "--no-kv-modes"
        )
    removed = {s: [b for b in range(num_blocks) if plan.mode(s, b) == Mode.REMOVED] for s in stages}
    if len(stages) == 2 and removed["prefill"] != removed["decode"]:
        raise PlanError(
            f"prefill is without blocks {removed['prefill']} and decode without "
            f"{removed['decode']}: unified is one model for both; search with --shared, or export "
            "--stage prefill and --stage decode"
        )
    kept = tuple(b for b in range(num_blocks) if b not in removed[stages[0]])
    if not kept:
        raise PlanError(
            f"{stage} keeps none of the {num_blocks} blocks; a checkpoint needs at least one"
        )
    return kept


def _check_whole(plan: PruningPlan, stage: Stage, num_blocks: int, without_kv_modes: str) -> None:
    """Raise if a block is neither whole nor gone, and name the option to search with instead."""
    modes = {b: plan.mode(stage, b) for b in range(num_blocks)}
    halves = {b: m for b, m in modes.items() if m not in (Mode.FULL, Mode.REMOVED)}
    if not halves:
        return
    has_parts = any(m.has_mlp or m.attends for m in halves.values())
    has_kv = any(m.writes_kv and not m.attends for m in halves.values())
    options = ["--unit block"] * has_parts + [without_kv_modes] * has_kv
    named = ", ".join(f"{b} ({m})" for b, m in halves.items())
    raise PlanError(
        f"{stage} runs blocks {named} in part, and a checkpoint holds whole blocks only; "
        f"search with {' and '.join(options)}"
    )


def _healed(plan: PruningPlan, stage: Part) -> Tensors:
    """Healed tensors that replace the source's, by canonical name."""
    if plan.healed is None:
        return {}
    if stage != "unified":
        return HealedWeights.load(plan, (stage,)).stages[stage]
    prefill, decode = (HealedWeights.load(plan).stages[name] for name in STAGES)
    apart = sorted(
        name
        for name in {*prefill, *decode}
        if name not in prefill or name not in decode or not torch.equal(prefill[name], decode[name])
    )
    if apart:
        raise PlanError(
            f"{len(apart)} tensors are healed apart in prefill and decode (first: {apart[0]}): "
            "unified is one model for both; search with --shared, or export --stage prefill and "
            "--stage decode"
        )
    return decode


def _check_expressible(healed: Tensors, stage: Part) -> None:
    """Raise if the stage has bridges, for which no architecture of a checkpoint has a place."""
    bridged = sorted({int(name.split(".")[1]) for name in healed if name.split(".")[2] == BRIDGE})
    if bridged:
        raise PlanError(
            f"{stage} has a bridge in block {', '.join(map(str, bridged))}: a linear map in place "
            "of removed blocks, which an ordinary checkpoint cannot express; search with --heal "
            "pair, all or none, or serve the plan with rayapp"
        )


def _not_carried(plan: PruningPlan, stage: Part, checkpoint: Checkpoint) -> Iterator[str]:
    """Sentences on the parts of the plan that the checkpoint cannot express."""
    ruled = sorted(b for b in plan.kv_transfer if plan.transfer(b) != SEND_ALL)
    if ruled:
        yield f"kv_transfer of blocks {ruled}: it attends to every entry, unquantised"
    if plan.visual_tokens:
        yield "visual_tokens: it reads every visual token of an image"
    if plan.first_token == "decode":
        yield "first_token decode: one model computes the whole prompt and every answer token"
    if _is_language_only(checkpoint, stage):
        yield "the vision tower: decode never sees an image, so this is the language model alone"


def _is_language_only(checkpoint: Checkpoint, stage: Part) -> bool:
    return stage == "decode" and checkpoint.config.model_type in MULTIMODAL_TYPES


def _write_config(checkpoint: Checkpoint, record: ExportRecord, directory: Path) -> None:
    """Write the source's config.json with fewer blocks, but keep its author's spelling."""
    raw = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    text = text_config(checkpoint.config)
    changes = fewer_blocks(text.to_dict(), record.kept_blocks)
    if _is_language_only(checkpoint, record.stage):
        changes["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
        changes["model_type"] = text.model_type
        outer = {key: raw[key] for key in ("dtype", "torch_dtype") if key in raw}
        raw = outer | (raw.get("text_config") or {})
    elif text is not checkpoint.config:
        changes = {"text_config": (raw.get("text_config") or {}) | changes}
    raw |= changes
    kept = {key: value for key, value in raw.items() if key not in _DROPPED_KEYS}
    (directory / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _copy_files(source: Path, directory: Path) -> None:
    """Copy tokenizer, templates and the like, but neither weights nor code."""
    for pattern in _CARRIED_FILES:
        for file in source.glob(pattern):
            if file.is_file() and file.suffix not in (".safetensors", ".py", ".bin", ".pt"):
                copy = directory / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def _tensors(
    checkpoint: Checkpoint, record: ExportRecord, directory: Path, healed: Tensors
) -> list[_Tensor]:
    """List the tensors that the exported configuration needs, with their names in the source.

    The names come from the exported model itself, on the meta device, so an incomplete source is
    noticed before a tensor is read. A tied head is left out, as the embedding stands for it.
    """
    model = empty_model(AutoConfig.from_pretrained(directory, local_files_only=True))
    model.tie_weights()
    stored = {canonical_name(name): name for name in checkpoint.names()}
    named = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = named - {name for name, _ in model.named_parameters()}
    language_only = _is_language_only(checkpoint, record.stage)
    wanted = {n: t.shape for n, t in model.state_dict().items() if n not in tied}
    before = {n: name_before(canonical_name(n), record.kept_blocks) for n in wanted}
    missing = [name for name in wanted if before[name] not in stored]
    if missing:
        raise ModelError(
            f"{checkpoint.path}: {len(missing)} tensors are missing (first: {missing[0]}); "
            "the checkpoint is incomplete or of another architecture"
        )
    _check_healed(healed, {before[name]: shape for name, shape in wanted.items()})
    tensors = []
    for name, shape in wanted.items():
        source = stored[before[name]]
        spelled = name if language_only else renumbered(source, canonical_name(name))
        tensors.append(_Tensor(source, spelled, shape, healed.get(before[name])))
    return tensors


def _check_healed(healed: Tensors, shapes: Mapping[str, torch.Size]) -> None:
    for name, tensor in healed.items():
        if shapes.get(name) != tensor.shape:
            raise PlanError(
                f"healed tensor {name!r} of shape {tuple(tensor.shape)} fits none of the exported "
                f"model; use the {HEALED_FILE} that was written with the plan"
            )


def _read(
    checkpoint: Checkpoint, tensors: Sequence[_Tensor], progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the tensors of the export one at a time, under their new names."""
    read = checkpoint.read(tensor.source for tensor in tensors)
    for done, (wanted, (_, stored)) in enumerate(zip(tensors, read, strict=True), start=1):
        value = stored if wanted.healed is None else wanted.healed.to(stored.dtype)
        if value.shape != wanted.shape:
            raise ModelError(
                f"{checkpoint.path}: tensor {wanted.source!r} has shape {tuple(value.shape)}, the "
                f"configuration says {tuple(wanted.shape)}; config.json and weights do not "
                "belong together"
            )
        yield wanted.name, value
        progress("tensors", done, len(tensors))
