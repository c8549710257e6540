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
from rayapp.plan import Stage

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
        first_token: The stage that makes the first answer token.
    """

    def __init__(
        self,
        prefill: PrefillServer,
        decode: DecodeServer,
        channel: KVChannel,
        deadlines: Deadlines,
        first_token: Stage,
    ) -> None:
        self._prefill, self._decode = prefill, decode
        self._channel, self._deadlines = channel, deadlines
        self._first_token = first_token

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

        Nothing is prefilled before decode has booked room. All tokens but the first leave by the
        decode server's ``deliver``.

        Args:
            prompt: The requests for all answers to a prompt.
            versions: The plan, weights and type that the caller wants.
            sent: Tokens that the client has already, by request id.
            address: The address of the replica that the call is for.
        """
        self._decode.check_not_cancelled(prompt)
        queue_s = self._deadlines.queue_s
        try:
            if prompt.needs_decode(self._first_token):
                seat = await self._decode.book(prompt, versions, queue_s, address)
                if isinstance(seat, Refusal):
                    yield seat
                    return
            items = self._prefill.prefill(prompt, versions, queue_s, address=address)
            async with aclosing(LocalStream(items)) as stream:
                answer: PrefillAnswer | Refusal = await stream.item()
                yield answer
                if isinstance(answer, Refusal) or answer.kv_bytes is None:
                    return
                handover = Handover.after(
                    prompt, versions, answer.firsts, sent, self._deadlines.transfer_s
                )
                admission = await self._admitted(handover, stream, answer.kv_bytes, address)
            yield admission
            await self._decode.follow(*prompt.key)
        finally:
            await self._decode.cancel(*prompt.key)

    async def _admitted(
        self, handover: Handover, stream: LocalStream, kv_bytes: int, address: Address
    ) -> Admission | Refusal:
        """Hand the KV of a prefill over to decode, within this process."""
        async with (
            self._channel.reserved(kv_bytes),
            self._channel.received(stream) as handle,
        ):
            here = Address(reader=address.reader)
            return await self._decode.admit(handover, [handle], here)

    async def cancel(self, name: str, attempt: int) -> None:
        """End this attempt, in whatever phase it is, even before it has come here."""
        await self._prefill.cancel(name, attempt)
        await self._decode.cancel(name, attempt)
