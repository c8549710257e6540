"""Both stages in one replica: a prompt is prefilled, and its answers decoded, where it is."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from rayapp.distributed.serve.messages import (
    ANY,
    Address,
    Admission,
    Handover,
    PrefillAnswer,
    Refusal,
    Versions,
)
from rayapp.distributed.serve.replicas.decode_server import DecodeServer
from rayapp.distributed.serve.replicas.prefill_server import PrefillServer
from rayapp.distributed.serve.settings import Deadlines
from rayapp.engine.channel import KVChannel, LocalStream
from rayapp.engine.request import PromptRequests

GeneratedItem = PrefillAnswer | Refusal | Admission
"""An item of the stream of an attempt within one replica."""


class BothStages:
    """A prefill and a decode server of one process, with a channel between them.

    KV is packed and unpacked as it is between two nodes, so the tokens are the same.

    Args:
        prefill: The prefill server.
        decode: The decode server, which fetches from the channel.
        channel: The channel.
        deadlines: The deadlines of all phases.
    """

    def __init__(
        self,
        prefill: PrefillServer,
        decode: DecodeServer,
        channel: KVChannel,
        deadlines: Deadlines,
    ) -> None:
        self._prefill, self._decode = prefill, decode
        self._channel, self._deadlines = channel, deadlines

    @property
    def pinned_bytes(self) -> int:
        """Number of bytes of KV between the stages."""
        return self._channel.pinned_bytes

    async def generate(
        self,
        prompt: PromptRequests,
        versions: Versions,
        sent: Mapping[str, Sequence[int]],
        address: Address = ANY,
    ) -> AsyncGenerator[GeneratedItem, None]:
        """Yield a :class:`PrefillAnswer`, then an :class:`Admission`; end with the last answer.

        All tokens but the first leave by the decode server's ``deliver``.

        Args:
            prompt: The requests for all answers to a prompt.
            versions: The plan, weights and type that the caller wants.
            sent: Tokens that the client has already, by request id.
            address: The address of the replica that the call is for.
        """
        self._decode.check_not_cancelled(prompt)
        items = self._prefill.prefill(prompt, versions, self._deadlines.queue_s, address)
        async with aclosing(LocalStream(items)) as stream:
            answer: PrefillAnswer | Refusal = await stream.item()
            yield answer
            if isinstance(answer, Refusal) or answer.kv_bytes is None:
                return
            handover = Handover.after(
                prompt, versions, answer.firsts, sent, self._deadlines.transfer_s
            )
            async with (
                self._channel.reserved(answer.kv_bytes),
                self._channel.received(stream) as handle,
            ):
                here = Address(reader=address.reader)
                admission = await self._decode.admit(handover, [handle], here)
        try:
            yield admission
            await self._decode.follow(*prompt.key)
        finally:
            await self._decode.cancel(*prompt.key)

    async def cancel(self, name: str, attempt: int) -> None:
        """End this attempt, in whatever phase it is, even before it has come here."""
        await self._prefill.cancel(name, attempt)
        await self._decode.cancel(name, attempt)
