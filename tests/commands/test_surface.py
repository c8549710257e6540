"""One command surface: `rayapp X` and `python jobs/X.py` are one command, and options mean the same
everywhere."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from rayapp import cli
from rayapp.commands.options import command, option_name, options_of
from rayapp.errors import InputError
from rayapp.settings import Strict

JOBS = Path(__file__).parents[2] / "jobs"
COMMANDS = sorted(cli.COMMANDS)
MEANT_THE_SAME = {
    "--model", "--revision", "--dtype", "--device", "--address", "--workers", "--threads",
    "--calibration", "--objective", "--score-by",
}  # fmt: skip
RUN_A_MODEL = ("prune", "kv-select", "evaluate", "generate", "report", "reproduce")
USE_EVALUATORS = ("prune", "kv-select", "report", "reproduce")


def leaves(name: str) -> list:
    """The commands behind a name: itself, or those of its group."""
    loaded = cli.load(name)
    return list(getattr(loaded, "commands", {name: loaded}).values())


def options(name: str) -> dict[str, object]:
    return {
        written: option
        for each in leaves(name)
        for option in each.params
        if option.param_type_name == "option"
        for written in option.opts
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_what_help_lists_is_what_the_command_says_of_itself(name):
    assert cli.load(name).help.splitlines()[0] == cli.COMMANDS[name].summary


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_line_is_a_sentence(name):
    for each in leaves(name):
        for parameter in each.params:
            text = parameter.help or ""
            assert re.fullmatch(r"[A-Z].*[a-z0-9)/']\.", text, re.DOTALL), (
                name,
                parameter.name,
                text,
            )
            assert len(text.split()) >= 3, (name, parameter.name, text)


def test_options_of_one_name_are_one_option():
    seen: dict[str, tuple[str, object]] = {}
    for name in COMMANDS:
        for written, option in options(name).items():
            if written not in MEANT_THE_SAME or option.param_type_name != "option":
                continue
            if name in ("demo", "doctor", "report", "serve") and written in (
                "--model",
                "--address",
                "--device",
                "--calibration",
            ):
                continue  # there it may be left out, or says where the whole service runs
            meaning = (option.help, option.default)
            first, known = seen.setdefault(written, (name, meaning))
            assert meaning == known, f"{written} of {name} differs from that of {first}"


@pytest.mark.parametrize("name", RUN_A_MODEL)
def test_commands_that_run_a_model_say_where_and_in_which_type(name):
    assert {"--model", "--revision", "--dtype", "--device"} <= set(options(name))


@pytest.mark.parametrize("name", USE_EVALUATORS)
def test_commands_that_use_evaluators_say_which(name):
    assert {"--workers", "--address", "--threads"} <= set(options(name))


# Every command is asked for its help in its turn; what one imports is new to it.
ASKS_FOR_HELP = """
import contextlib, io, json, sys
from rayapp import cli

new, before = {}, set()
for name in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main([name, "--help"] if name != "rayapp" else ["--help"])
        except SystemExit as stop:
            assert not stop.code, (name, stop.code)
    new[name] = sorted(sys.modules.keys() - before)
    before |= sys.modules.keys()
print(json.dumps(new))
"""


@pytest.fixture(scope="module")
def imported_by_help() -> dict[str, set[str]]:
    """What the list of commands imports, and what every command's help imports in addition."""
    words = [sys.executable, "-c", ASKS_FOR_HELP, "rayapp", *COMMANDS]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=True)
    return {name: set(modules) for name, modules in json.loads(done.stdout).items()}


def test_listing_the_commands_imports_no_settings(imported_by_help):
    modules = imported_by_help["rayapp"]
    assert "rayapp.cli" in modules
    assert not modules & {"torch", "ray", "transformers", "pydantic", "numpy"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_waits_for_no_model(imported_by_help, name):
    assert not imported_by_help[name] & {"torch", "ray", "transformers"}


def help_of(shown: str) -> str:
    return re.sub(r"Usage: .*", "", shown)


@pytest.mark.parametrize("file", sorted(JOBS.glob("*.py")), ids=lambda file: file.name)
def test_a_job_is_the_command_of_its_name(file, run_job_here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit):
        cli.main([file.stem.replace("_", "-"), "--help"])
    shown = help_of(capsys.readouterr().out)
    assert help_of(run_job_here(file.stem, "--help").stdout) == shown
    assert f"{option_name('help')}" in shown
    assert len(file.read_text().splitlines()) <= 12


def test_a_job_is_a_program_of_its_own(run_job, run_job_here):
    assert run_job("prune", "--help").stdout == run_job_here("prune", "--help").stdout


class Sizes(Strict):
    """Settings of a command that exists in this test only."""

    count: int = Field(ge=1, description="Number of things.")
    share: float = Field(
        default=0.5, description="Share of them.", json_schema_extra={"option": "part"}
    )
    names: tuple[str, ...] = Field(default=("a",), description="Names of them.")
    careful: bool = Field(default=True, description="Whether care is taken.")
    inner: dict[str, int] = Field(default_factory=dict, description="No option.")


def called(monkeypatch, *words: str) -> BaseModel:
    """The settings that a command line fills."""
    seen = []

    @command(part=0.25)
    def measure(sizes: Sizes) -> None:
        """Measure the sizes that the options fill."""
        seen.append(sizes)

    import typer

    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command()(measure)
    single(args=list(words), standalone_mode=False)
    return seen[0]


def test_options_are_made_of_fields(monkeypatch):
    assert [option.name for option in options_of(Sizes)] == ["count", "part", "names", "careful"]
    assert called(monkeypatch, "--count", "2") == Sizes(count=2, share=0.25)
    words = ("--count", "3", "--part", "0.1", "--names", "x", "--names", "y", "--no-careful")
    assert called(monkeypatch, *words) == Sizes(count=3, share=0.1, names=("x", "y"), careful=False)


def test_what_breaks_a_rule_is_named_by_its_option(monkeypatch):
    with pytest.raises(InputError, match=r"^--count=0: Input should be greater"):
        called(monkeypatch, "--count", "0")


def test_a_commands_signature_is_its_options():
    from rayapp.commands.evaluate import evaluate

    names = list(inspect.signature(evaluate).parameters)
    assert names[:2] == ["model", "revision"]
    assert {"runs", "limit", "threads", "dtype", "device", "data", "out"} <= set(names)
    assert "settings" not in names
