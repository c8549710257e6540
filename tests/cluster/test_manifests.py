"""Manifests parse, and their settings are ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from rayapp.distributed.cluster.local import ENVIRONMENT
from rayapp.distributed.serve.autoscaling import POLICY
from rayapp.distributed.serve.deploy import IMPORT_PATH
from rayapp.distributed.serve.exposure import check_exposure
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.errors import InputError

CLUSTER = Path(__file__).parents[2] / "cluster"


def load(name):
    return yaml.safe_load((CLUSTER / name).read_text())


def serve_configs():
    kuberay = load("kuberay.yaml")["spec"]
    return {"serve": load("serve.yaml"), "kuberay": yaml.safe_load(kuberay["serveConfigV2"])}


@pytest.mark.parametrize("name", ["serve", "kuberay"])
def test_a_serve_configuration_holds_valid_settings(name):
    config = ServeDeploySchema.model_validate(serve_configs()[name])
    (application,) = config.applications
    assert application.import_path == IMPORT_PATH
    settings = ServiceSettings.parse(application.args)
    assert settings.prefill.labels == {"role": "prefill"}
    assert settings.decode.replicas.is_elastic
    assert application.autoscaling_policy == {"policy_function": POLICY}
    reports = application.runtime_env["env_vars"]
    assert {ENVIRONMENT[name] for name in reports} == set(reports.values()) == {"1"}
    check_exposure(settings, config.http_options.host)
    if not settings.api_key_digest:
        with pytest.raises(InputError, match="no API key is set"):
            check_exposure(settings, "0.0.0.0")


def test_every_pool_has_nodes_with_its_label():
    spec = load("kuberay.yaml")["spec"]["rayClusterConfig"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    settings = ServiceSettings.parse(serve_configs()["kuberay"]["applications"][0]["args"])
    for pool in (*settings.pools.values(), settings.ingress):
        assert pool.labels in [group["labels"] for group in groups]
    assert spec["authOptions"] == {"mode": "token"}


def test_ray_up_starts_every_node_with_a_token():
    config = load("ray-up.yaml")
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token ray start" in config[commands][-1]
        assert "--labels=" in config[commands][-1]
