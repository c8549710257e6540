"""The policy as Serve calls it, with contexts like Serve's; no cluster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rayapp.distributed.serve import autoscaling
from rayapp.distributed.serve.app import deployment_options
from rayapp.distributed.serve.autoscaling import POLICY, ServicePolicy, view_of
from rayapp.distributed.serve.deploy import configuration
from rayapp.distributed.serve.settings import DECODE, INGRESS, PREFILL, ServiceSettings
from rayapp.scaling.reports import DecodeReport, PrefillReport
from rayapp.scaling.settings import ScalingSettings

BUSY = PrefillReport(100.0, 10, 50.0, 300.0, 1e-3, 1.0)
FULL = DecodeReport(30, 0, 3000, 32, 1e6, 0.02, 0.01, 0.0, 100.0, 30, 1.0)


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """What is published for people."""
    lines = []
    monkeypatch.setattr(autoscaling, "publish", lambda pool, text: lines.append(text))
    return lines


def context(name, report, *, target=2, bounds=(1, 8), at_s=None, replicas=("a", "b"), scaling=None):
    """One deployment as Serve describes it, whose replicas all made the same report."""
    import time

    moment = time.time() if at_s is None else at_s
    numbers = report.numbers() if report else {}
    points = {
        key: {replica: [SimpleNamespace(timestamp=moment, value=value)] for replica in replicas}
        for key, value in numbers.items()
    }
    kwargs = {"scaling": (scaling or ScalingSettings()).model_dump(mode="json")}
    return SimpleNamespace(
        deployment_name=name,
        raw_metrics=points,
        running_replicas=list(replicas),
        target_num_replicas=target,
        capacity_adjusted_min_replicas=bounds[0],
        capacity_adjusted_max_replicas=bounds[1],
        config=SimpleNamespace(policy=SimpleNamespace(policy_kwargs=kwargs)),
    )


def test_one_decision_is_made_over_all_deployments(told):
    contexts = {
        1: context(PREFILL, BUSY),
        2: context(DECODE, FULL),
        3: context(INGRESS, None, target=1, bounds=(1, 1), replicas=("i",)),
    }
    numbers, state = ServicePolicy()(contexts)
    assert numbers[1] > 2
    assert numbers[2] > 2
    assert numbers[3] == 1
    assert state == {}
    assert any(line.startswith("decode 2 -> ") and "s of work against a target" in line
               for line in told)  # fmt: skip


def test_a_deployment_alone_is_decided_too():
    number, state = ServicePolicy()(context(PREFILL, BUSY))
    assert number > 2
    assert state == {}


def test_settings_come_with_the_deployments():
    patient = ScalingSettings.model_validate({"targets": {"ttft_ms": 10_000_000}})
    assert ServicePolicy()(context(PREFILL, BUSY, scaling=patient))[0] == 2
    given = {"scaling": patient.model_dump(mode="json")}
    assert ServicePolicy(**given)(context(PREFILL, BUSY))[0] == 2


@pytest.mark.parametrize(
    "broken",
    [{"raw_metrics": 3}, {"raw_metrics": None}, {"running_replicas": ()}, {"config": None}],
)
def test_nothing_raises_and_pools_stay(broken):
    """Serve would silently fall back to its own policy."""
    seen = context(PREFILL, BUSY, target=5)
    vars(seen).update(broken)
    assert ServicePolicy()(seen) == (5, {})


def test_a_view_has_the_newest_report_of_every_replica():
    seen = context(PREFILL, BUSY, at_s=7.0)
    del seen.raw_metrics["queued_s"]["b"]
    view = view_of(seen)
    assert view.heard["a"].prefill == BUSY
    assert view.heard["a"].at_s == 7.0
    assert view.heard["b"].prefill is None
    assert view.heard["a"].decode is None


def test_fixed_pools_join_and_the_ingress_never_scales():
    settings = ServiceSettings.parse(
        {"model": "m", "prefill": {"replicas": 2}, "decode": {"replicas": "1:4"}}
    )
    for name, bounds in ((PREFILL, (2, 2)), (DECODE, (1, 4)), (INGRESS, (1, 1))):
        pool = settings.ingress if name == INGRESS else settings.pools[name]
        config = deployment_options(settings, name, pool)["autoscaling_config"]
        assert (config.min_replicas, config.max_replicas) == bounds
        assert (config.upscale_delay_s, config.downscale_delay_s) == (0.0, 0.0)
        assert config.policy.policy_function == POLICY
    (application,) = configuration(settings)["applications"]
    assert application["autoscaling_policy"] == {"policy_function": POLICY}


def test_pools_of_fixed_size_need_no_policy():
    settings = ServiceSettings.parse({"model": "m"})
    assert deployment_options(settings, PREFILL, settings.prefill)["num_replicas"] == 1
    assert "autoscaling_policy" not in configuration(settings)["applications"][0]
