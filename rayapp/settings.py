"""The base of all settings: strict models, one way to check them, and types of common options.

A command's options are the fields of the settings models that it fills
(:mod:`rayapp.commands.options`), so a field's type, default and description are written once, here
or in the room that the settings belong to. Nothing here imports torch: ``rayapp prune --help`` must
not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rayapp.errors import InputError

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""Element types in which a checkpoint can be loaded; ``auto`` is its own."""

MODEL_HELP = "Directory of the model (safetensors), or its Hub id such as owner/name."
ModelName = Annotated[str, Field(min_length=1, description=MODEL_HELP)]
REVISION_HELP = "Branch, tag or commit of a Hub id; its main branch without."
Revision = Annotated[str | None, Field(description=REVISION_HELP)]
DTYPE_HELP = "Element type that the model computes in; auto keeps its own."
DTypeName = Annotated[DType, Field(description=DTYPE_HELP)]
Mode = Annotated[
    Literal["disaggregated", "unified"],
    Field(
        description="Stages on replicas of their own (disaggregated), or both in each (unified)."
    ),
]
MaxModelLen = Annotated[
    int | None,
    Field(
        ge=1,
        description="Most tokens of a prompt and its answer together; the model's limit without.",
    ),
]
MaxNumSeqs = Annotated[
    int, Field(ge=1, description="Sequences that one decode replica runs at once.")
]
MaxNumBatchedTokens = Annotated[
    int,
    Field(
        ge=1, description="Prompt tokens that one step may compute; longer prompts run in chunks."
    ),
]
Device = Annotated[
    str, Field(description="Device that computes: cpu, cuda, or auto for all GPUs that are there.")
]
Threads = Annotated[int, Field(ge=1, description="Torch threads of each process that computes.")]
Workers = Annotated[
    int,
    Field(
        ge=0,
        description="Evaluators on a Ray cluster that share the work; 0 works in this process, "
        "without Ray.",
    ),
]
Address = Annotated[
    str | None,
    Field(
        description="Address of the Ray cluster; without it, the running one is used, or a local "
        "one is started.",
    ),
]


class Strict(BaseModel):
    """Plain data that refuses unknown keys by their path, and never changes.

    The ``title`` of a model's configuration is the heading of its options on a help page.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


class Settings(Strict):
    """Settings of a command, which its options fill."""

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """Make settings from plain values; an :class:`InputError` names every bad one."""
        return checked(cls, values)


class ModelSource(Settings):
    """Settings that name a model."""

    model_config = ConfigDict(title="The model")

    model: ModelName
    revision: Revision = None


class ModelSettings(ModelSource):
    """Settings that name a model, its element type and its device."""

    dtype: DTypeName = "auto"
    device: Device = "cpu"


_Settings = TypeVar("_Settings", bound=BaseModel)


def checked(
    kind: type[_Settings], values: Mapping[str, Any], name: Callable[[str], str] = str
) -> _Settings:
    """Make settings of a kind; an :class:`InputError` names every bad value.

    Args:
        kind: The class of the settings.
        values: The values by field.
        name: Function from a field to its name in the user's input, for errors.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError("; ".join(_explain(fault, name) for fault in error.errors())) from None


def filled(values: Mapping[str, Any], *kinds: type[Settings]) -> list[Any]:
    """Make one settings object of every kind, from the values for which it has fields.

    Raises:
        InputError: Values are bad, or no kind has a field for them; all of them are named.
    """
    known = {name for kind in kinds for name in kind.model_fields}
    faults = [f"{n}={values[n]!r}: there is no such setting" for n in values.keys() - known]
    made = []
    for kind in kinds:
        try:
            made.append(checked(kind, {n: v for n, v in values.items() if n in kind.model_fields}))
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults))
    return made


def _explain(error: Any, name: Callable[[str], str]) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:  # The rule concerns several values, which its message names.
        return message
    field, *path = map(str, error["loc"])
    return f"{'.'.join([name(field), *path])}={error['input']!r}: {message}"
