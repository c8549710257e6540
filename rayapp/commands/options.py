"""Options of a command, made of the settings models that it fills.

A command is a function whose parameters are settings models, and further options of its own.
Every field of a model becomes an option: its name, type, default and description are written once,
in the model. A field may say more in ``json_schema_extra``:
``{"option": "runs"}`` is the option's name if it differs from the field's, ``{"as_text": True}``
takes text that the model itself reads, ``{"as_texts": True}`` takes such text several times, and
``{"envvar": "NAME"}`` reads an environment variable. Fields that are models or mappings are no
options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rayapp.errors import InputError
from rayapp.settings import checked

_PLAIN = (str, int, float, bool)


@dataclass(frozen=True)
class Option:
    """One field of a settings model, as an option of a command line."""

    field: str
    name: str
    annotation: Any
    default: Any

    @property
    def parameter(self) -> inspect.Parameter:
        """The parameter of a function that typer reads the option from."""
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=self.default,
            annotation=self.annotation,
        )


def command(
    *, without: Collection[str] = (), **defaults: object
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function: options of its settings models in place of the models.

    Settings are checked before the function is called; an error names the option at fault.
    Models that have an option in common, such as ``--seed``, all receive its value.

    Args:
        without: Fields that this command leaves at their defaults.
        defaults: Defaults of options that differ in this command from the model's.
    """

    def made(function: Callable[..., None]) -> Callable[..., None]:
        return _command(function, frozenset(without), defaults)

    return made


def _command(
    function: Callable[..., None], without: frozenset[str], defaults: Mapping[str, object]
) -> Callable[..., None]:
    hints = get_type_hints(function, include_extras=True)
    models = {name: kind for name, kind in hints.items() if _is_settings(kind)}
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in models:
            for option in options_of(models[name]):
                if option.name not in without:
                    default = defaults.get(option.name, option.default)
                    parameters.setdefault(option.name, option.parameter.replace(default=default))
        else:
            own = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
            parameters[name] = own

    def run(**given: Any) -> None:
        own = {name: value for name, value in given.items() if name in hints and name not in models}
        function(**_all_filled(models, given, without), **own)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__module__ = function.__module__
    run.__annotations__ = {name: one.annotation for name, one in parameters.items()}
    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    return run


def _is_settings(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, BaseModel)


def options_of(kind: type[BaseModel]) -> Iterator[Option]:
    """The options of a settings model, in the order of its fields."""
    for field, info in kind.model_fields.items():
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        name = extra.get("option", field)
        taken = _taken(info, extra)
        if taken is not None:
            default = _default(info, as_text="as_text" in extra or "as_texts" in extra)
            extra = {"panel": kind.model_config.get("title"), **extra}
            annotation = _annotated(taken, str(name), default, info, extra)
            yield Option(field, str(name), annotation, default)


def option_name(name: str) -> str:
    """A field's or parameter's name as it is written on a command line."""
    return "--" + name.replace("_", "-")


def _taken(info: FieldInfo, extra: dict[str, Any]) -> Any:
    """The type that typer reads for a field; None if the field is no option."""
    if extra.get("as_text"):
        return str if info.is_required() else str | None
    if extra.get("as_texts"):
        return list[str] if info.is_required() else list[str] | None
    return _on_the_command_line(info.annotation)


def _default(info: FieldInfo, *, as_text: bool) -> Any:
    """The default of an option as typer shows it; a model's own text form is left to the model."""
    if info.is_required():
        return inspect.Parameter.empty
    default = info.get_default(call_default_factory=True)
    if as_text:
        return None
    return list(default) if isinstance(default, tuple | frozenset) else default


def _annotated(taken: Any, name: str, default: Any, info: FieldInfo, extra: dict[str, Any]) -> Any:
    names = (option_name(name),)
    if taken is bool and default is True:
        names = (f"{option_name(name)}/{option_name(f'no_{name}')}",)
    option = typer.Option(
        *names,
        help=info.description,
        envvar=extra.get("envvar"),
        rich_help_panel=extra["panel"],
    )
    return Annotated[taken, option]


def _on_the_command_line(annotation: Any) -> Any:
    """The type that typer reads for an annotation; None if the field is no option."""
    if get_origin(annotation) is Annotated:
        return _on_the_command_line(get_args(annotation)[0])
    if annotation in _PLAIN:
        return annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return annotation
    if origin in (Union, UnionType):
        taken = [
            _on_the_command_line(argument) for argument in arguments if argument is not NoneType
        ]
        return taken[0] | None if len(taken) == 1 and taken[0] is not None else None
    if origin in (list, tuple, frozenset) and arguments:
        inner: Any = _on_the_command_line(arguments[0])
        return list[inner] if inner else None
    return None


def _all_filled(
    models: Mapping[str, type[BaseModel]], given: Mapping[str, Any], without: frozenset[str]
) -> dict[str, BaseModel]:
    """The settings models of a command; raises :class:`InputError` naming every bad option."""
    settings: dict[str, BaseModel] = {}
    faults = []
    for name, kind in models.items():
        try:
            settings[name] = _filled(kind, given, without)
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults))
    return settings


def _filled(kind: type[BaseModel], given: Mapping[str, Any], without: frozenset[str]) -> BaseModel:
    """Fill a settings model with the values of its options."""
    names = {option.field: option.name for option in options_of(kind)}
    taken = {field: name for field, name in names.items() if name not in without}
    values = {field: given[name] for field, name in taken.items() if given[name] is not None}

    def written(field: str) -> str:
        return option_name(names.get(field, field))

    return checked(kind, values, written)
