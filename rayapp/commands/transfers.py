"""``rayapp transfers``: the ledger of a running service."""

from __future__ import annotations

from typing import Annotated

import typer

from rayapp.errors import InputError


def transfers(
    url: Annotated[str, typer.Option(help="Base URL of the service.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="RAYAPP_API_KEY", help="Key that the service asks for.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the ledger as JSON, as the service sent it.")
    ] = False,
) -> None:
    """Print the transfer ledger of a running service."""
    import httpx

    from rayapp.workflows.tables import ledger_tables
    from rayapp.workflows.terminal import show, table_console

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
        show(table_console(), *ledger_tables(ledger))
