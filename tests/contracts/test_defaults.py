"""A command line's defaults are those of its settings, where it does not leave them to these."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import BaseModel

from rayapp import cli
from rayapp.pruning.kv_choice.settings import KVSelectSettings
from rayapp.pruning.settings import PruneSettings

JOBS = Path(__file__).parents[2] / "jobs"


def job(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"job_{name}", JOBS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        (cli.prune, PruneSettings),
        (cli.kv_select, KVSelectSettings),
        (job("prune").main, PruneSettings),
        (job("kv_select").main, KVSelectSettings),
    ],
    ids=["prune", "kv-select", "jobs/prune.py", "jobs/kv_select.py"],
)
def test_defaults_agree(command, settings: type[BaseModel]) -> None:
    options = {
        name: option.default
        for name, option in inspect.signature(command).parameters.items()
        if option.default is not inspect.Parameter.empty
    }
    shared = {name for name in settings.model_fields if options.get(name) is not None}
    assert len(shared) >= 3
    wrong = {
        name: (options[name], settings.model_fields[name].default)
        for name in shared
        if options[name] != settings.model_fields[name].default
    }
    assert not wrong
