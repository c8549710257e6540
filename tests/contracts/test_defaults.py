"""A command line's defaults are those of its settings, where it does not leave them to these."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest

from rayapp import cli
from rayapp.pruning.kv_choice.settings import KVSelectSettings
from rayapp.pruning.settings.compute import ComputeSettings
from rayapp.pruning.settings.score import ScoreSettings
from rayapp.pruning.settings.search import SearchSettings

JOBS = Path(__file__).parents[2] / "jobs"


def job(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"job_{name}", JOBS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SEARCH = (ScoreSettings, ComputeSettings, SearchSettings)
CHOICE = (ComputeSettings, KVSelectSettings)  # its --dtype is an encoding


@pytest.mark.parametrize(
    ("command", "kinds"),
    [
        (cli.prune, SEARCH),
        (cli.kv_select, CHOICE),
        (job("prune").main, SEARCH),
        (job("kv_select").main, CHOICE),
    ],
    ids=["prune", "kv-select", "jobs/prune.py", "jobs/kv_select.py"],
)
def test_defaults_agree(command, kinds) -> None:
    options = {
        name: option.default
        for name, option in inspect.signature(command).parameters.items()
        if option.default is not inspect.Parameter.empty
    }
    fields = {name: field for kind in kinds for name, field in kind.model_fields.items()}
    shared = {name for name in fields if options.get(name) is not None}
    assert len(shared) >= 3
    wrong = {
        name: (options[name], fields[name].default)
        for name in shared
        if options[name] != fields[name].default
    }
    assert not wrong
