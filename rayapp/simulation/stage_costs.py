"""Measured costs of a model's stages on one kind of machine, as a file that a simulation reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from rayapp.errors import InputError
from rayapp.scaling.costs import DecodeCost, LinkCost, PrefillCost
from rayapp.settings import Strict


class StageCosts(Strict):
    """Costs and sizes of a replica of either stage.

    Args:
        name: The model, plan and machine in a few words.
        prefill: Cost of a prefill step.
        decode: Cost of a decode step.
        link: Cost of a transfer of KV.
        prompt_kv_bytes: Bytes that are sent per prompt token.
        kept_share: Share of a prompt's entries that decode holds, over the dense model's.
        max_num_batched_tokens: Tokens of a prefill step.
        max_num_seqs: Slots of a decode replica.
        max_entries: Entries of KV that a decode replica's pages hold.
        cold_start_s: Seconds from the decision for a replica until it works.
        overhead_s: Seconds that a request takes beside its stages, until its first token.
    """

    name: str = ""
    prefill: PrefillCost
    decode: DecodeCost
    link: LinkCost = LinkCost()
    prompt_kv_bytes: float = Field(default=0.0, ge=0.0)
    kept_share: float = Field(default=1.0, gt=0.0, le=1.0)
    max_num_batched_tokens: int = Field(default=512, ge=1)
    max_num_seqs: int = Field(default=32, ge=1)
    max_entries: int = Field(default=1 << 20, ge=1)
    cold_start_s: float = Field(default=10.0, ge=0.0)
    overhead_s: float = Field(default=0.0, ge=0.0)

    @classmethod
    def load(cls, path: Path) -> StageCosts:
        """Read a file of costs.

        Raises:
            InputError: The file cannot be read, or is none of these.
        """
        try:
            raw: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: no file of stage costs ({error}); write one with "
                "`rayapp plan-capacity --model DIR --save-costs FILE`"
            ) from None
        return cls.parsed(raw, str(path))

    @classmethod
    def parsed(cls, raw: Any, where: str) -> StageCosts:
        """Check costs that were read from ``where``; an :class:`InputError` names what is wrong."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            reasons = "; ".join(
                f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}"
                for one in error.errors()
            )
            raise InputError(f"{where}: costs that cannot be used: {reasons}") from None

    def save(self, path: Path) -> None:
        """Write the costs as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
