"""What all settings share: strict models, one way to check them, and the names of common options.

A command's options are the fields of the settings models that it fills
(:mod:`rayapp.commands.options`), so a field's type, default and description are written once, here
or in the room that the settings belong to. Nothing here imports torch: ``rayapp prune --help`` must
not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rayapp.errors import InputError

DType = Literal["auto", "float32", "bfloat16", "float16"]

ModelName = Annotated[
    str,
    Field(
        min_length=1,
        description="Directory of the model (safetensors), or its Hub id such as owner/name.",
    ),
]
Revision = Annotated[
    str | None, Field(description="Branch, tag or commit of a Hub id; its main branch without.")
]
DTypeName = Annotated[
    DType, Field(description="Element type that the model computes in; auto keeps its own.")
]
Device = Annotated[
    str, Field(description="Device that computes: cpu, cuda, or auto for all GPUs that are there.")
]
Threads = Annotated[int, Field(ge=1, description="Torch threads of each process that computes.")]
Workers = Annotated[
    int,
    Field(
        ge=0, description="Evaluators on a Ray cluster; 0 computes in this process, without Ray."
    ),
]
Address = Annotated[
    str | None,
    Field(description="Ray cluster to use; without it the running one, or one started here."),
]


class Strict(BaseModel):
    """A frozen model of plain data that refuses unknown keys by their path."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSource(Strict):
    """Where a model comes from."""

    model: ModelName
    revision: Revision = None


class ModelSettings(ModelSource):
    """Where a model comes from, in which element type and on which device it computes."""

    dtype: DTypeName = "auto"
    device: Device = "cpu"


_Settings = TypeVar("_Settings", bound=BaseModel)


def checked(
    kind: type[_Settings], values: Mapping[str, Any], name: Callable[[str], str] = str
) -> _Settings:
    """Settings of a kind; raises :class:`InputError` naming every bad value.

    Args:
        kind: The settings' class.
        values: By field.
        name: What a field is called where its value was written.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError("; ".join(_explain(each, name) for each in error.errors())) from None


def _explain(error: Any, name: Callable[[str], str]) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:  # a rule of several values, which its message names
        return message
    field, *path = map(str, error["loc"])
    return f"{'.'.join([name(field), *path])}={error['input']!r}: {message}"
