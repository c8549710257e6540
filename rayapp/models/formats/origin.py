"""The record of a converted model's origin, beside its weights; results repeat its caption.

Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from rayapp.errors import ModelError
from rayapp.settings import Strict

ORIGIN_FILE = "rayapp_model.json"
GGUF_REMEDY = (
    "a GGUF file is not loaded as it is; dequantise it once with transformers: "
    "AutoModelForCausalLM.from_pretrained(folder, gguf_file=name).save_pretrained(new_folder), and "
    "the same with AutoTokenizer (`rayapp smollm2` does so for the model that it fetches)"
)

_CHUNK_BYTES = 1 << 22


class Origin(Strict):
    """Record of where a checkpoint's weights come from.

    Attributes:
        version: Version of this record's form.
        caption: The model's name with what was done to its weights, which every result repeats.
        source: The package that the weights came in, with its version.
        source_sha256: Hash of the file of weights in that package.
        license: The licence of the weights, as SPDX names it.
        weights_fingerprint: Fingerprint of the checkpoint
            (:mod:`rayapp.models.fingerprints.fingerprint`).
        files: Hash of every other file of the checkpoint, by name.
    """

    version: Literal[1] = 1
    caption: str = Field(min_length=1, max_length=200)
    source: str
    source_sha256: str
    license: str
    weights_fingerprint: str
    files: dict[str, str]

    def derived(self, caption: str, weights_fingerprint: str, directory: Path) -> Origin:
        """The record of a checkpoint that was made from this one, and whose files lie there."""
        return self.model_copy(
            update={
                "caption": caption,
                "weights_fingerprint": weights_fingerprint,
                "files": hashes_of(directory),
            }
        )

    def write(self, directory: Path) -> None:
        """Write the record into the directory of a checkpoint."""
        text = self.model_dump_json(indent=2) + "\n"
        (directory / ORIGIN_FILE).write_text(text, encoding="utf-8")

    def changed_files(self, directory: Path) -> Iterator[str]:
        """Names of the files that are missing, or that are not what they were."""
        for name, digest in self.files.items():
            file = directory / name
            if not file.is_file() or sha256_of(file) != digest:
                yield name


def read_origin(directory: Path) -> Origin | None:
    """Read the record of a checkpoint; None if it has none, as most checkpoints.

    Raises:
        ModelError: There is a record, but it cannot be read.
    """
    file = directory / ORIGIN_FILE
    try:
        return Origin.model_validate_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError) as error:
        reason = getattr(error, "strerror", None) or "not such a record"
        raise ModelError(
            f"{file}: cannot be read ({reason}); restore it, or remove it if nothing is known of "
            "the model's origin"
        ) from None


def hashes_of(directory: Path) -> dict[str, str]:
    """The SHA-256 hash of every file that lies in a directory, by name."""
    files = sorted(entry for entry in directory.iterdir() if entry.is_file())
    return {file.name: sha256_of(file) for file in files}


def sha256_of(file: Path) -> str:
    """The SHA-256 hash of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
