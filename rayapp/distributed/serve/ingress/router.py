"""A request router for Serve that honours addresses.

The handoff takes two calls to one decode replica, so the second must reach the replica of the
first. Serve has ``choose_replica`` for one call only. A call whose replica has gone is sent to
another one, which refuses it (:class:`rayapp.distributed.serve.messages.MisdirectedError`): a
router that offers nothing would retry for ever.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from rayapp.distributed.serve.messages import ANY, Address


class AddressedRouter(RequestRouter):
    """Routes to the addressed replica, else to the least busy one that is not to be avoided.

    It is not FIFO, because Serve's FIFO mixin gives a replica chosen for one request to another.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the candidates in ranks; Serve takes the shortest queue within a rank."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        address = pending_request.kwargs.get("address", ANY)
        return ranks(address, {r.replica_id.unique_id: r for r in candidate_replicas})


def ranks(address: Address, replicas: dict[str, RunningReplica]) -> list[list[RunningReplica]]:
    """Sort ``replicas`` (by id) into ranks, in the order in which ``address`` wants them tried."""
    wanted = [r for name, r in replicas.items() if name == address.replica_id]
    if wanted:
        return [wanted]
    allowed = [r for name, r in replicas.items() if name not in address.avoid]
    return [rank for rank in (allowed, list(replicas.values())) if rank]
