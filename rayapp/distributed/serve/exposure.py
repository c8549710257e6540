"""Who may reach a service: beyond this machine it needs a key, wherever it is built."""

from __future__ import annotations

import ipaddress

import ray
from ray.serve.context import _get_global_client

from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.errors import InputError


def check_exposure(settings: ServiceSettings, host: str | None = None) -> None:
    """Raise :class:`InputError` if strangers could use the service and nobody has decided that.

    Args:
        settings: The settings of the service.
        host: The address on which Serve listens; that of the settings without it.
    """
    host = host or settings.host
    if settings.key_digest or settings.allow_unauthenticated or _is_loopback(host):
        return
    raise InputError(
        f"host {host!r} can be reached from other machines and no API key is set; give --api-key "
        "(api_key_digest in a file), listen on 127.0.0.1, or say --allow-unauthenticated"
    )


def serving_host() -> str | None:
    """The address on which Serve listens in this process's cluster; None where it does not run.

    A declarative configuration names it beside the settings, so they alone do not tell.
    """
    if not ray.is_initialized():
        return None
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config.host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
