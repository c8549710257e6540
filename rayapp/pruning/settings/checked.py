"""Settings that are checked as a whole: every bad value is named in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from rayapp.errors import InputError


class Settings(BaseModel):
    """Values that a command is given: unknown ones are refused, and none changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """Settings from a command line; raises :class:`InputError` naming every bad value."""
        found: Self = filled(values, cls)[0]
        return found


def filled(values: Mapping[str, Any], *kinds: type[Settings]) -> list[Any]:
    """One settings object of every kind, each from the values that it has a field for.

    Raises:
        InputError: Values are bad, or no kind has a field for them; all of them are named.
    """
    known = {name for kind in kinds for name in kind.model_fields}
    faults = [
        f"{name}={values[name]!r}: there is no such setting" for name in values.keys() - known
    ]
    found = []
    for kind in kinds:
        try:
            found.append(
                kind.model_validate({n: v for n, v in values.items() if n in kind.model_fields})
            )
        except ValidationError as error:
            faults += [_explain(each) for each in error.errors()]
    if faults:
        raise InputError("; ".join(faults))
    return found


def _explain(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:  # a rule of several values, which its message names
        return message
    return f"{'.'.join(map(str, error['loc']))}={error['input']!r}: {message}"
