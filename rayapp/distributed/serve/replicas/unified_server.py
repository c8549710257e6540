"""A unified replica runs both stages: the fallback for one node, and a base for comparisons.

Modes, selection and the encode-decode round trip are the same as over two nodes, and so are the
tokens; the KV never leaves the process and no transfer is recorded.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from rayapp.api.service import ReplicaHealth
from rayapp.distributed.serve.messages import ANY, Address, Place, TokenRow, Versions
from rayapp.distributed.serve.replicas.both_stages import BothStages, GeneratedItem
from rayapp.distributed.serve.replicas.decode_server import DecodeServer
from rayapp.distributed.serve.replicas.engine_loop import EngineLoop
from rayapp.distributed.serve.replicas.joint_steps import JointSteps
from rayapp.distributed.serve.replicas.prefill_server import PrefillServer
from rayapp.distributed.serve.replicas.stage import StageModel
from rayapp.distributed.serve.settings import Deadlines
from rayapp.engine.channel import LocalChannel
from rayapp.engine.request import PromptRequests
from rayapp.engine.sequences.memory import KVMemory
from rayapp.scaling.settings import Targets


class UnifiedServer:
    """A prefill and a decode server on one loop, whose steps run tokens and chunks.

    Args:
        stage: The union of both stages.
        place: The replica and the node of this server.
        max_num_seqs: Number of slots.
        max_waiting: Prompts that may wait; further ones are refused.
        max_num_batched_tokens: Tokens that one step may compute.
        deadlines: The deadlines of leases, answers and steps.
        memory: The memory for KV.
        tpot_s: Seconds per token that its answers are to meet.
    """

    def __init__(
        self,
        stage: StageModel,
        place: Place,
        *,
        max_num_seqs: int,
        max_waiting: int,
        max_num_batched_tokens: int,
        deadlines: Deadlines,
        memory: KVMemory = KVMemory(),  # noqa: B008 - frozen
        tpot_s: float = Targets().tpot_s,
    ) -> None:
        loop = EngineLoop(max_num_batched_tokens)
        channel = LocalChannel()
        self._prefill = PrefillServer(
            stage,
            place,
            loop,
            max_waiting=max_waiting,
            step_s=deadlines.step_s,
        )
        self._decode = DecodeServer(
            stage,
            place,
            loop,
            fetch=channel.fetch,
            max_num_seqs=max_num_seqs,
            deadlines=deadlines,
            memory=memory,
            tpot_s=tpot_s,
        )
        self.joint = JointSteps(loop, self._prefill, self._decode)
        self._both = BothStages(
            self._prefill, self._decode, channel, deadlines, stage.plan.first_token
        )

    async def generate(
        self,
        prompt: PromptRequests,
        versions: Versions,
        sent: Mapping[str, Sequence[int]],
        address: Address = ANY,
    ) -> AsyncGenerator[GeneratedItem, None]:
        """Yield the items of an attempt; see :meth:`BothStages.generate`."""
        items = self._both.generate(prompt, versions, sent, address)
        async with aclosing(items) as generated:
            async for item in generated:
                yield item

    async def deliver(self, address: Address = ANY) -> AsyncGenerator[list[TokenRow], None]:
        """Generate the tokens of all answers for the calling ingress, an item per step."""
        async with aclosing(self._decode.deliver(address)) as items:
            async for item in items:
                yield item

    async def cancel(self, name: str, attempt: int, address: Address = ANY) -> None:
        """End this attempt, in whatever phase it is, even before it has come here."""
        await self._both.cancel(name, attempt)

    async def describe(self) -> ReplicaHealth:
        """Describe this replica for ``/health``."""
        prefill, decode = self._prefill.health("unified"), self._decode.health("unified")
        waiting = prefill.num_waiting + decode.num_waiting
        return decode.model_copy(
            update={"num_waiting": waiting, "image_cache": prefill.image_cache}
        )

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Numbers by which :class:`rayapp.distributed.serve.autoscaling.ServicePolicy` decides."""
        return {
            **self._prefill.record_autoscaling_stats(),
            **self._decode.record_autoscaling_stats(),
        }

    def record_routing_stats(self) -> dict[str, float]:
        """Numbers by which the router chooses between replicas: the work of both stages."""
        prefill, decode = (one.record_routing_stats() for one in (self._prefill, self._decode))
        names = ("work_s", "token_s", "errand_s", "lasts_s", "wait_s")
        return {**prefill, **{name: prefill[name] + decode[name] for name in names}}

    async def check_health(self) -> None:
        """Raise :class:`UnavailableError` if a call hangs; Serve asks this every few seconds."""
        await self._prefill.check_health()
        await self._decode.check_health()

    async def check_integrity(self) -> dict[str, int]:
        """Return the numbers of resources in use, all zero when idle."""
        prefill, decode = (
            await self._prefill.check_integrity(),
            await self._decode.check_integrity(),
        )
        running = prefill.pop("running") + decode.pop("running")
        return {
            **prefill,
            **decode,
            "running": running,
            "pinned_bytes": self._both.pinned_bytes,
        }
