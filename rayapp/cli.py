"""The command line: parse, call one function of a room below, print.

Bad input is one line and exit code 2.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler

from rayapp.errors import InputError, RayappError, RequestError

# Rooms are imported inside the commands: `rayapp --help` must not wait for torch and ray.

app = typer.Typer(
    help="Prune a language model per inference stage; serve prefill and decode apart on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
plan_app = typer.Typer(help="Look at plans.", no_args_is_help=True)
app.add_typer(plan_app, name="plan")

Model = Annotated[Path, typer.Option("--model", help="Model directory (safetensors).")]
Plan = Annotated[Path | None, typer.Option("--plan", help="Plan directory or plan.json.")]
DTypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Element type; auto keeps the checkpoint's."),
]


def main() -> None:
    """Entry point of ``rayapp``: every error that we raise on purpose becomes one line."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
    )
    try:
        app()
    except InputError as error:
        sys.exit(_complain(error, 2))
    except RayappError as error:
        sys.exit(_complain(error, 1))
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(error: RayappError, code: int) -> int:
    Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)
    return code


def _load_plan(path: Path | None) -> Any:
    from rayapp.plan import PruningPlan

    return PruningPlan.load(path) if path else PruningPlan()


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(help="Prompt text; may be given several times.")],
    plan: Plan = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 keeps all.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling noise.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text.")] = None,
    dtype: DTypeOption = "auto",
) -> None:
    """Answer prompts in this process: the reference that the service must equal. No Ray."""
    from pydantic import ValidationError

    from rayapp.engine.local import LocalPipeline
    from rayapp.engine.request import SamplingParams
    from rayapp.models.loading import load_model

    try:
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            stop=tuple(stop or ()),
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise RequestError(f"{option} {first['input']}: {first['msg']}") from None
    pruning_plan = _load_plan(plan)
    loaded = load_model(model, plan=pruning_plan, stage="unified", dtype=dtype)
    pipeline = LocalPipeline(loaded.model, loaded.tokenizer, pruning_plan)
    for completion in pipeline.generate(list(prompt), sampling):
        typer.echo(completion.text)


@app.command()
def transfers(
    url: Annotated[str, typer.Option(help="Base URL of a service.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="RAYAPP_API_KEY")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the raw ledger.")] = False,
) -> None:
    """Print the transfer ledger of a running service."""
    import httpx

    from rayapp.terminal import ledger_tables

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(f"{url.rstrip('/')}/v1/transfers", headers=headers, timeout=10.0)
        answer.raise_for_status()
        ledger = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise InputError(f"{url}: gave no ledger ({error}); is a service running there?") from None
    if as_json:
        typer.echo(answer.text)
    else:
        Console().print(*ledger_tables(ledger), sep="\n")


@plan_app.command("show")
def plan_show(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Plan directory or plan.json.")],
) -> None:
    """Draw what each stage computes and which KV travels."""
    from rayapp.terminal import plan_tables

    Console().print(*plan_tables(_load_plan(path)), sep="\n")


if __name__ == "__main__":
    main()
