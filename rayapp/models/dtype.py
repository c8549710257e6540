"""Names of the element types that a checkpoint can be loaded in; plain words, without torch."""

from __future__ import annotations

from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "float16"]
