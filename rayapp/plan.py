"""A pruning plan, rayapp's artifact: the computation of both stages, and the KV that travels.

A plan is plain data and needs no torch. A decoder block has two parts, attention and MLP, and one
product, its KV. Per stage and block a plan names a :class:`Mode`; blocks that are not listed are
computed in full. An empty plan is exactly the dense model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)

from rayapp.errors import PlanError
from rayapp.settings import Strict

PLAN_FILE = "plan.json"
HEALED_FILE = "weights.safetensors"

FINGERPRINT_MARK = "v2:"
"""Prefix of a fingerprint: the version of its scheme. The first scheme has no prefix."""

Stage = Literal["prefill", "decode"]
STAGES: tuple[Stage, ...] = ("prefill", "decode")
Encoding = Literal["model", "int8", "int4"]
KEY_GROUP = 64
"""Number of kept entries of a block, counted from its first in prompt order, whose encoded keys
share scales (project default, measured by ``benchmarks/key_groups.py``). It defines ``int8`` and
``int4``: with another number the same plan makes other tokens."""
Sharing = Literal["equal", "diversity"]


class Mode(StrEnum):
    """Mode of a block in one stage: which of attention, MLP and KV are computed."""

    FULL = "full"
    ATTENTION_ONLY = "attention_only"
    MLP_ONLY = "mlp_only"
    MLP_AND_KV = "mlp_and_kv"
    KV_ONLY = "kv_only"
    REMOVED = "removed"

    @property
    def attends(self) -> bool:
        """True if attention is computed."""
        return self in (Mode.FULL, Mode.ATTENTION_ONLY)

    @property
    def has_mlp(self) -> bool:
        """True if the MLP is computed."""
        return self in (Mode.FULL, Mode.MLP_ONLY, Mode.MLP_AND_KV)

    @property
    def writes_kv(self) -> bool:
        """True if keys and values are computed and kept."""
        return self.attends or self in (Mode.MLP_AND_KV, Mode.KV_ONLY)

    @property
    def removal(self) -> float:
        """Share of a block that this mode removes: half for attention, and half for the MLP."""
        return 0.5 * (not self.attends) + 0.5 * (not self.has_mlp)


STAGE_MODES: dict[Stage, frozenset[Mode]] = {
    "prefill": frozenset(Mode),
    "decode": frozenset({Mode.FULL, Mode.ATTENTION_ONLY, Mode.MLP_ONLY, Mode.REMOVED}),
}


def _count_or_share(value: object) -> object:
    """Check an amount: a JSON integer is a count (>= 0), a JSON float a share in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is neither a count (integer) nor a share (decimal number)")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"a count is at least 0, got {value}")
    if isinstance(value, float) and not 0.0 <= value <= 1.0:
        raise ValueError(f"a share lies between 0.0 and 1.0, got {value}; write counts as integers")
    return value


CountOrShare = Annotated[StrictInt | StrictFloat, BeforeValidator(_count_or_share)]


def resolve(amount: int | float, num_entries: int) -> int:
    """Resolve a count or a share of ``num_entries`` to a number of entries; shares round up."""
    if isinstance(amount, int):
        return min(amount, num_entries)
    return min(math.ceil(amount * num_entries - 1e-9), num_entries)


class KVTransfer(Strict):
    """The rule for one block's KV: the entries that travel to decode, and their encoding.

    Without ``first`` and ``last``, all entries travel. Counts or shares refer to the entries left
    after visual pruning, in prompt order (PDTrim's first and last tokens, arXiv:2509.04467).
    """

    first: CountOrShare | None = None
    last: CountOrShare | None = None
    encoding: Encoding = "model"

    @model_validator(mode="after")
    def _keeps_something(self) -> KVTransfer:
        if not self.keeps_all and not (self.first or self.last):
            raise ValueError("first + last must keep at least one entry; drop both to send all")
        return self

    @property
    def keeps_all(self) -> bool:
        """True if every entry travels, whatever the prompt's length."""
        return self.first is None and self.last is None

    def counts(self, num_entries: int) -> tuple[int, int]:
        """Numbers of ``(first, last)`` entries kept; ``(num_entries, 0)`` if they cover all."""
        if self.keeps_all:
            return num_entries, 0
        first, last = resolve(self.first or 0, num_entries), resolve(self.last or 0, num_entries)
        return (num_entries, 0) if first + last >= num_entries else (first, last)


SEND_ALL = KVTransfer()


def encoding_identity(rules: Mapping[int, KVTransfer]) -> dict[str, int]:
    """The definition of the encodings as part of an identity; empty if no block is encoded.

    It keeps records of plans that encode nothing as they are, and those of other encodings apart.
    """
    is_encoded = any(rule.encoding != "model" for rule in rules.values())
    return {"key_group": KEY_GROUP} if is_encoded else {}


class VisualTokens(Strict):
    """The rule for visual tokens in prefill (TrimTokenator, arXiv:2509.00320, and others).

    ``num_keep`` counts per image. ``sharing`` says how several images of a prompt share their total
    budget: ``equal`` leaves every image its own, ``diversity`` gives more to an image whose tokens
    differ more, among themselves and from other images (after arXiv:2512.22748).
    """

    method: str = "trimtokenator"
    num_aligned: CountOrShare | None = None
    num_keep: CountOrShare
    positions: Literal["original", "compact"] = "original"
    sharing: Sharing = "equal"

    @model_validator(mode="after")
    def _budget(self) -> VisualTokens:
        if not self.num_keep:
            raise ValueError("num_keep must keep at least one visual token")
        return self


class ModelSignature(Strict):
    """Signature of a model; a plan can be applied only to a model with its signature.

    ``weights_fingerprint`` stands for all weights and for every setting that changes KV
    (:mod:`rayapp.models.fingerprints.fingerprint`); its mark names the scheme.
    """

    model_type: str
    num_blocks: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    weights_fingerprint: str


def is_outdated(recorded: str, wanted: str) -> bool:
    """True if a weights fingerprint is of the first scheme, without a mark, and ours has a mark."""
    return wanted.startswith(FINGERPRINT_MARK) and not re.match(r"v\d+:", recorded)


def renewal_hint(directory: str | Path | None) -> str:
    """Remedy for a fingerprint of the first scheme in ``directory``, as a clause of an error."""
    return (
        "names its model by a fingerprint of an earlier release, which saw samples of the weights "
        f"only; `rayapp plan renew {directory or 'DIR'} --model MODEL` checks that it is of this "
        "model, and renews it"
    )


class StagePlan(Strict):
    """The blocks of one stage that are not computed in full, by block number."""

    blocks: dict[int, Mode] = Field(default_factory=dict)

    def mode(self, block: int) -> Mode:
        """The mode of ``block``, which is full if the block is not listed."""
        return self.blocks.get(block, Mode.FULL)


class PruningPlan(Strict):
    """A plan: the computation of both stages, the KV that travels, and the model's signature.

    ``healed`` is the digest of the tensors in ``weights.safetensors`` beside the plan
    (:mod:`rayapp.models.healed`), the retrained weights of blocks that survive a removal.
    ``directory`` is the place that a plan was read from, and so the place of those tensors; it is
    no part of the plan.
    """

    version: Literal[1] = 1
    model: ModelSignature | None = None
    first_token: Stage = "prefill"
    prefill: StagePlan = StagePlan()
    decode: StagePlan = StagePlan()
    kv_transfer: dict[int, KVTransfer] = Field(default_factory=dict)
    visual_tokens: VisualTokens | None = None
    healed: str | None = Field(default=None, pattern="^[0-9a-f]{24}$")
    provenance: dict[str, Any] = Field(default_factory=dict)
    _directory: Path | None = PrivateAttr(default=None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PruningPlan) and self.__dict__ == other.__dict__

    @model_validator(mode="after")
    def _check(self) -> PruningPlan:
        named = sorted({*self.prefill.blocks, *self.decode.blocks, *self.kv_transfer})
        if not self.is_empty and self.model is None:
            raise ValueError(
                "a plan that changes anything names its model: add the model's signature as `model`"
            )
        if named and (named[0] < 0 or (self.model and named[-1] >= self.model.num_blocks)):
            limit = self.model.num_blocks if self.model else 0
            raise ValueError(f"blocks {named} must lie in 0..{limit - 1}, the blocks of the model")
        for stage in STAGES:
            self._check_modes(stage)
        for block in named:
            self._check_coupling(block)
        return self

    def _check_modes(self, stage: Stage) -> None:
        for block, mode in self.stage(stage).blocks.items():
            if mode not in STAGE_MODES[stage]:
                allowed = ", ".join(sorted(STAGE_MODES[stage]))
                raise ValueError(
                    f"{stage}.blocks.{block}: mode {mode} is not allowed in {stage}; "
                    f"use one of {allowed}"
                )

    def _check_coupling(self, block: int) -> None:
        prefill, decode = self.prefill.mode(block), self.decode.mode(block)
        if decode.attends and not prefill.writes_kv:
            raise ValueError(
                f"block {block}: decode is {decode} and attends, but prefill is {prefill} and "
                "writes no KV; make prefill full, attention_only, mlp_and_kv or kv_only, "
                "or decode mlp_only or removed"
            )
        if block in self.kv_transfer and not decode.attends:
            raise ValueError(
                f"kv_transfer.{block}: decode is {decode} in block {block} and needs no KV; "
                "drop the entry"
            )

    def stage(self, stage: Stage) -> StagePlan:
        """The plan of one stage."""
        return self.prefill if stage == "prefill" else self.decode

    def mode(self, stage: Stage, block: int) -> Mode:
        """The mode of ``block`` in ``stage``."""
        return self.stage(stage).mode(block)

    def transfer(self, block: int) -> KVTransfer:
        """The transfer rule of ``block``; by default, all entries in the model's own type."""
        return self.kv_transfer.get(block, SEND_ALL)

    def removed(self, stage: Stage) -> float:
        """Number of blocks removed from ``stage``, a part counting one half."""
        return sum(mode.removal for mode in self.stage(stage).blocks.values())

    @property
    def only_changes_decode(self) -> bool:
        """Whether decode is not dense, and prefill runs all blocks on all tokens.

        Healing adds nothing to it: it trains a stage for what that stage misses. Tensors where no
        stage misses anything may be of either stage.
        """
        if self.removed("prefill") or self.visual_tokens is not None:
            return False
        return self.removed("decode") > 0 or not (self.healed or self.is_empty)

    @property
    def is_empty(self) -> bool:
        """True if this is the dense model."""
        return not (
            any(m != Mode.FULL for s in STAGES for m in self.stage(s).blocks.values())
            or any(rule != SEND_ALL for rule in self.kv_transfer.values())
            or self.visual_tokens
            or self.healed
            or self.first_token != "prefill"
        )

    @property
    def fingerprint(self) -> str:
        """Hash of all that changes the computation; provenance and spelling do not count.

        The definition of the encodings belongs to it where a block is encoded, so that releases
        which encode differently never take each other's KV, evaluations or scores for their own.
        """
        content = self.model_dump(mode="json", exclude={"provenance"})
        for stage in STAGES:
            modes = content[stage]["blocks"]
            content[stage]["blocks"] = {b: m for b, m in sorted(modes.items()) if m != Mode.FULL}
        content["kv_transfer"] = {
            b: self.kv_transfer[int(b)].model_dump(mode="json")
            for b in sorted(content["kv_transfer"])
            if self.kv_transfer[int(b)] != SEND_ALL
        }
        content |= encoding_identity(self.kv_transfer)
        if self.is_empty:
            content["model"] = None
        if self.healed is None:  # Plans from before healing keep their fingerprint.
            del content["healed"]
        if self.visual_tokens and self.visual_tokens.sharing == "equal":  # So do older ones.
            del content["visual_tokens"]["sharing"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def directory(self) -> Path | None:
        """The directory of this plan and its healed tensors; None if it was made in memory."""
        return self._directory

    def with_healed(self, digest: str | None, directory: Path | None = None) -> PruningPlan:
        """Return the same plan with these healed tensors, which lie in ``directory``."""
        plan = PruningPlan.model_validate({**dict(self), "healed": digest})
        plan._directory = directory
        return plan

    def check_model(self, signature: ModelSignature) -> None:
        """Raise :class:`PlanError` if the plan was made for another model.

        The error names only the fields that differ. An empty plan without a signature fits every
        model.
        """
        if self.model is None:
            return
        ours, theirs = self.model.model_dump(), signature.model_dump()
        names = [name for name in ours if ours[name] != theirs[name]]
        differing = [f"{k}: plan {ours[k]!r}, model {theirs[k]!r}" for k in names]
        prints = ours["weights_fingerprint"], theirs["weights_fingerprint"]
        if names == ["weights_fingerprint"] and is_outdated(*prints):
            raise PlanError(f"the plan {renewal_hint(self._directory)} ({differing[0]})")
        if differing:
            raise PlanError(
                "the plan was made for another model (" + "; ".join(differing) + "); "
                "use the checkpoint that it was searched on, or search again"
            )

    @classmethod
    def parse(cls, text: str, *, source: str = "plan") -> PruningPlan:
        """Parse a plan from JSON text; a :class:`PlanError` names the path of every broken rule."""
        try:
            raw = json.loads(text, object_pairs_hook=_unique_keys)
        except json.JSONDecodeError as error:
            raise PlanError(
                f"{source}: not JSON ({error.msg} at line {error.lineno}); write one JSON object"
            ) from None
        except ValueError as error:
            raise PlanError(f"{source}: {error}") from None
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise PlanError(
                f"{source}: " + "; ".join(_explain(e) for e in error.errors())
            ) from None

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Load a plan from its file or from the file's directory; may raise :class:`PlanError`."""
        file = Path(path)
        file = file / PLAN_FILE if file.is_dir() else file
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise PlanError(
                f"{file}: cannot be read ({reason}); give a plan directory or its {PLAN_FILE}"
            ) from None
        plan = cls.parse(text, source=str(file))
        plan._directory = file.absolute().parent
        return plan

    def dumps(self) -> str:
        """Return human-readable JSON text, which :meth:`parse` reads back as an equal plan."""
        return (
            json.dumps(self.model_dump(mode="json", exclude_none=True), indent=2, sort_keys=False)
            + "\n"
        )

    def save(self, directory: str | Path) -> Path:
        """Write the plan into ``directory`` (created if missing), atomically; returns the file.

        The healed tensors beside the plan's own file are copied first.
        """
        target = Path(directory) / PLAN_FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        source = self.healed and self._directory and self._directory / HEALED_FILE
        if source and source.is_file() and source.parent != target.parent.absolute():
            shutil.copyfile(source, target.parent / HEALED_FILE)
        temporary = target.with_suffix(".tmp")
        temporary.write_text(self.dumps(), encoding="utf-8")
        temporary.replace(target)
        return target


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, and refuse repeated keys: one would silently lose its first value."""
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"key `{twice[0]}` stands twice in one object; keep one of them")
    return dict(pairs)


def _explain(error: Any) -> str:
    """Describe a pydantic error in one line: the path of the value, and the rule."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key `{path}`; remove it or correct its spelling"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{path}: {message}" if path else message
