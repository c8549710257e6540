"""The autoscaling policy as Serve calls it: one decision over ingress, prefill and decode.

Serve asks an application's policy with a context of every deployment that has an autoscaling
configuration; pools of fixed size have one too, with equal bounds. The decision itself is
:func:`rayapp.scaling.policy.decide`, whose settings travel as ``policy_kwargs`` of every
deployment, so a Serve configuration names them once, in the arguments of the application. Serve's
own delays are 0: the policy has its own.

If a configuration names no policy for the application, Serve asks this one for every deployment
alone. Nothing here may raise: Serve would silently fall back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from rayapp.distributed.serve.decisions import publish
from rayapp.scaling.policy import Memory, decide
from rayapp.scaling.reports import DecodeReport, IngressReport, PrefillReport
from rayapp.scaling.settings import ScalingSettings
from rayapp.scaling.view import Decision, Heard, PoolView

logger = logging.getLogger(__name__)

POLICY = f"{__name__}:ServicePolicy"


class ServicePolicy:
    """The policy of a service, with its memory.

    Args:
        scaling: The fields of :class:`rayapp.scaling.settings.ScalingSettings`; without them, those
            that the deployments carry are used.
    """

    def __init__(self, scaling: Mapping[str, Any] | None = None) -> None:
        self._given = scaling
        self._memory = Memory()
        self._told: dict[str, str] = {}

    def __call__(self, contexts: Any) -> tuple[Any, dict[Any, Any]]:
        """Answer Serve's question for the number of replicas, of one deployment or of all."""
        if not isinstance(contexts, Mapping):
            numbers = self._numbers({contexts.deployment_name: contexts})
            return numbers[contexts.deployment_name], {}
        named = {str(context.deployment_name): context for context in contexts.values()}
        numbers = self._numbers(named)
        return {key: numbers[str(one.deployment_name)] for key, one in contexts.items()}, {}

    def _numbers(self, contexts: Mapping[str, Any]) -> dict[str, int]:
        """The number of replicas of every deployment; the present ones if a decision fails."""
        try:
            view = {name: view_of(context) for name, context in contexts.items()}
            settings = self._settings(contexts)
            decisions, self._memory = decide(settings, self._memory, view, time.time())
            self._tell(decisions)
            return {name: max(1, decisions[name].after) for name in contexts}
        except Exception:
            logger.exception("the autoscaling policy failed; the pools stay as they are")
            return {name: context.target_num_replicas for name, context in contexts.items()}

    def _settings(self, contexts: Mapping[str, Any]) -> ScalingSettings:
        carried = [context.config.policy.policy_kwargs for context in contexts.values()]
        scaling = self._given or next((one["scaling"] for one in carried if one), {})
        return ScalingSettings.model_validate(scaling)

    def _tell(self, decisions: Mapping[str, Decision]) -> None:
        """Log every change with its reason, and publish it for people."""
        for name, decision in decisions.items():
            if decision.is_change:
                logger.warning("%s", decision)
                self._told[name] = str(decision)
                publish(name, str(decision))


def view_of(context: Any) -> PoolView:
    """One deployment of Serve's as the policy sees it: its bounds, and the newest reports."""
    series = context.raw_metrics or {}
    heard = {}
    for replica in context.running_replicas:
        points = {
            name: values[replica][-1] for name, values in series.items() if values.get(replica)
        }
        if points:
            numbers = {name: point.value for name, point in points.items()}
            heard[str(replica)] = Heard(
                at_s=max(point.timestamp for point in points.values()),
                prefill=PrefillReport.read(numbers),
                decode=DecodeReport.read(numbers),
                ingress=IngressReport.read(numbers),
            )
    return PoolView(
        minimum=context.capacity_adjusted_min_replicas,
        maximum=context.capacity_adjusted_max_replicas,
        target=context.target_num_replicas,
        running=tuple(map(str, context.running_replicas)),
        heard=heard,
    )
