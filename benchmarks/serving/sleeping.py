"""The service with blocks that compute nothing: they sleep for as long as measured ones take.

On few cores more replicas that compute gain nothing, while more of these do. Only the blocks are
replaced: ingress, router, leases, schedulers, engines, pages, messages of KV, meters and the policy
are the service's own. KV is all zeros, and the next token depends on the last one alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from ray.serve import Application

from rayapp.distributed.serve.replicas.replicas import DecodeReplica, PrefillReplica
from rayapp.distributed.serve.settings import DECODE, PREFILL, ServiceSettings
from rayapp.models.stack import BlockStack
from rayapp.scaling.costs import DecodeCost, PrefillCost
from rayapp.simulation.stage_costs import StageCosts
from serving.changed import bound, changed_configuration


class SleepingPrompts:
    """Blocks of prefill that sleep, and write zeros as KV.

    Args:
        stack: The blocks for which they stand.
        cost: What a step of them is to take.
    """

    def __init__(self, stack: BlockStack, cost: PrefillCost) -> None:
        self._stack, self._cost = stack, cost

    def run(
        self, hidden_1TE: torch.Tensor, positions_1T: torch.Tensor, cache: Any, *_: Any, **__: Any
    ) -> torch.Tensor:
        """The hidden states as they came, after the time of a step."""
        stack, cost, num_tokens = self._stack, self._cost, hidden_1TE.shape[1]
        # A token attends to as many others as lie before it: its position.
        num_pairs = float(positions_1T.sum())
        time.sleep(cost.step_s + num_tokens * cost.token_s + num_pairs * cost.pair_s)
        shape = (1, stack.num_kv_heads, num_tokens, stack.head_dim)
        for block in (number for number, writes in enumerate(stack.writes_kv) if writes):
            nothing_1HTD = hidden_1TE.new_zeros(shape)
            cache.update(nothing_1HTD, nothing_1HTD, block)
        return hidden_1TE


class SleepingTokens:
    """Blocks of decode that sleep.

    Args:
        cost: What a step of them is to take.
    """

    is_plain = True

    def __init__(self, cost: DecodeCost) -> None:
        self._cost = cost

    def run(self, hidden_B1E: torch.Tensor, positions_B1: torch.Tensor, *_: Any) -> torch.Tensor:
        """The hidden states as they came, after the time of a step."""
        time.sleep(self._cost.seconds(len(hidden_B1E), float(positions_B1.sum())))
        return hidden_B1E


class SleepingPrefill(PrefillReplica):
    """A prefill replica whose blocks sleep."""

    def __init__(self, settings: ServiceSettings, costs: StageCosts) -> None:
        super().__init__(settings)
        self.engine.blocks = SleepingPrompts(self.engine.stack, costs.prefill)


class SleepingDecode(DecodeReplica):
    """A decode replica whose blocks sleep."""

    def __init__(self, settings: ServiceSettings, costs: StageCosts) -> None:
        super().__init__(settings)
        self.engine.blocks = SleepingTokens(costs.decode)


_SERVERS = {PREFILL: SleepingPrefill, DECODE: SleepingDecode}


def build(args: Mapping[str, Any]) -> Application:
    """Build the application, as the service's own ``build`` does.

    Args:
        args: ``settings`` of the service, and ``costs`` of the stages, as plain data.
    """
    costs = StageCosts.parsed(args["costs"], "the costs of blocks that sleep")
    return bound(ServiceSettings.parse(args["settings"]), _SERVERS, costs)


def sleeping_configuration(settings: ServiceSettings, costs: StageCosts) -> dict[str, Any]:
    """The Serve configuration of a service whose blocks sleep; all else is as in the service's."""
    return changed_configuration(settings, __name__, costs=costs.model_dump())
