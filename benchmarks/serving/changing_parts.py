"""The service with a prefill pool that is told, between requests, how KV is cut into parts.

Requests that are cut in one way and in another can so be asked in turns of one and the same
service: a machine whose speed changes favours none, and no other service idles beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application

from rayapp.distributed.serve.messages import ANY, Address
from rayapp.distributed.serve.replicas.replicas import DecodeReplica, PrefillReplica
from rayapp.distributed.serve.settings import APP_NAME, DECODE, PREFILL, ServiceSettings
from serving.changed import bound, changed_configuration


class ChangingPrefill(PrefillReplica):
    """A prefill replica whose parts cost what it is told; it keeps the rates that it measured."""

    async def cost_of_parts(self, part_ms: float, address: Address = ANY) -> None:
        """Cut the KV of later prompts as if the calls for a part took ``part_ms``."""
        parts = self.queue._parts
        assert parts is not None, "a prefill replica of the service sends parts"
        parts._cost_s = part_ms / 1000


_SERVERS = {PREFILL: ChangingPrefill, DECODE: DecodeReplica}


def build(args: Mapping[str, Any]) -> Application:
    """Build the application, as the service's own ``build`` does."""
    return bound(ServiceSettings.parse(args["settings"]), _SERVERS)


def changing_configuration(settings: ServiceSettings) -> dict[str, Any]:
    """The Serve configuration of such a service; all else is as in the service's own."""
    return changed_configuration(settings, __name__)


def set_cost_of_parts(part_ms: float) -> None:
    """Tell the prefill replica of the running service what a part costs from now on."""
    prefill = serve.get_deployment_handle(PREFILL, APP_NAME)
    prefill.cost_of_parts.remote(part_ms, address=ANY).result(timeout_s=30.0)
