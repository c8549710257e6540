"""The service with other replicas than its own; ingress, router and configuration stay."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from rayapp.distributed.serve.app import deployment_options
from rayapp.distributed.serve.deploy import configuration
from rayapp.distributed.serve.exposure import check_exposure, serving_host
from rayapp.distributed.serve.ingress.ingress import Ingress
from rayapp.distributed.serve.settings import INGRESS, ServiceSettings

_BENCHMARKS = Path(__file__).parents[1]


def bound(settings: ServiceSettings, servers: Mapping[str, Any], *arguments: Any) -> Application:
    """Bind the application, as the service's own ``build`` does.

    Args:
        settings: The settings of the service.
        servers: The classes of replicas, by pool.
        arguments: What they are constructed with, beside the settings.
    """
    check_exposure(settings, serving_host())
    pools = {
        name: serve.deployment(
            servers[name], name=name, **deployment_options(settings, name, pool)
        ).bind(settings, *arguments)
        for name, pool in settings.pools.items()
    }
    options = deployment_options(settings, INGRESS, settings.ingress)
    ingress = serve.deployment(serve.ingress()(Ingress), name=INGRESS, **options)
    return ingress.bind(settings, **pools)


def changed_configuration(settings: ServiceSettings, module: str, **more: Any) -> dict[str, Any]:
    """The Serve configuration of a service that the ``build`` of a module makes.

    Args:
        settings: The settings of the service.
        module: The module of this package.
        more: Plain data that ``build`` finds beside the ``settings``.
    """
    config = configuration(settings)
    (application,) = config["applications"]
    # Replicas find this package beside what they would find anyway.
    path = os.pathsep.join(filter(None, (str(_BENCHMARKS), os.environ.get("PYTHONPATH"))))
    changed = {
        "import_path": f"{module}:build",
        "args": {"settings": application["args"], **more},
        "runtime_env": {"env_vars": {"PYTHONPATH": path}},
    }
    return {**config, "applications": [{**application, **changed}]}
