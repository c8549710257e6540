"""When a part of a prompt's KV is sent before the rest of it is computed.

Small parts leave little to wait for at the prompt's end, and cost many calls. With B bytes of a
prompt in parts of s bytes, a cost of c seconds per part and a rate of r bytes per second, calls
take ``c B / s`` and the last part ``s / r``; their sum is least at ``s = sqrt(B c r)``, where it is
``2 sqrt(B c / r)``. Sent whole, the prompt takes ``c + B / r``. From ``B = 4 c r`` on, parts save
the cost of a call or more; a smaller prompt, which could save less, goes whole. Calls that are
under way when the prompt ends would make the last part wait, so a part that is not in time stays
for it. All numbers but the cost are measured: the rate where KV is packed and where it has arrived,
the time that is left from the blocks that have run.
"""

from __future__ import annotations

import math
import time

_FIRST_RATE = 1e9
"""Bytes per second until a message has been packed; the first few messages correct it."""
_WEIGHT = 0.2
_LEAST_BYTES = 512 * 1024
"""Bytes of the smallest part where calls cost anything: Ray carries values below 100 kB inside
its own messages, through the process that owns them, and int4 weighs about a quarter."""
_LEAST_CALLS = 4
_NUM_CALLS = 2
"""Calls for a first part: decode reserves a seat, then it copies."""


class PartSizes:
    """Says from how many bytes on, and until when, a part of a prompt's KV is sent alone.

    Args:
        cost_s: Seconds that the calls for one part take; 0 sends whatever is finished at once.
    """

    def __init__(self, cost_s: float) -> None:
        self._cost_s = cost_s
        self._pack_rate = _FIRST_RATE
        self._handoff_rate = math.inf

    def least_bytes(self, num_bytes: int) -> int:
        """Number of bytes of a part of a prompt that has ``num_bytes`` of KV in all."""
        if not self._cost_s:
            return 0
        in_a_call = self._cost_s * min(self._pack_rate, self._handoff_rate)
        if num_bytes < _LEAST_CALLS * in_a_call:
            return num_bytes
        return max(_LEAST_BYTES, int(math.sqrt(num_bytes * in_a_call)))

    def is_in_time(self, left_s: float) -> bool:
        """Whether a part's calls end before its prompt does.

        Args:
            left_s: Seconds until the prompt's end, as far as that is known.
        """
        return left_s >= _NUM_CALLS * self._cost_s

    def packed(self, num_bytes: int, seconds: float) -> None:
        """Take note of KV that was packed here; bytes are those of the model's own type."""
        if num_bytes and seconds > 0:
            self._pack_rate += _WEIGHT * (num_bytes / seconds - self._pack_rate)

    def handed_over(self, byte_s: float) -> None:
        """Take note of the seconds per byte that a caller has measured, from here into pages.

        Args:
            byte_s: Seconds per byte of the model's own type; 0 if the caller does not know.
        """
        if byte_s > 0:
            self._handoff_rate = 1 / byte_s


class PassProgress:
    """How far a pass of the engine has come, noted on its thread and read on others.

    A block writes its KV before it attends, so the time per block is underestimated at first, and
    with it the time that is left: a part that would be in time only just is not sent.

    Args:
        num_tokens: Number of tokens of the pass.
        num_blocks: Number of its blocks that write KV.
    """

    def __init__(self, num_tokens: int, num_blocks: int) -> None:
        self._num_tokens = max(1, num_tokens)
        self._num_blocks = num_blocks
        self._began_s = time.monotonic()
        # One tuple, so that nobody reads a number without the time that belongs to it.
        self._noted: tuple[int, float] = (0, self._began_s)

    def begin(self) -> None:
        """Note that the first block begins."""
        self._began_s = time.monotonic()
        self._noted = (0, self._began_s)

    def note(self) -> None:
        """Note that one more block has written its KV."""
        self._noted = (self._noted[0] + 1, time.monotonic())

    def end(self) -> None:
        """Note that the pass has ended."""
        self._noted = (self._num_blocks, time.monotonic())

    @property
    def token_s(self) -> float:
        """Seconds per token, as the blocks so far let expect; 0 before the first."""
        return self._block_s * self._num_blocks / self._num_tokens

    @property
    def left_s(self) -> float:
        """Seconds until the pass ends, as the blocks so far let expect; 0 before the first."""
        num_done, noted_s = self._noted
        expected_s = (self._num_blocks - num_done) * self._block_s
        return max(0.0, expected_s - (time.monotonic() - noted_s))

    @property
    def _block_s(self) -> float:
        num_done, noted_s = self._noted
        return (noted_s - self._began_s) / num_done if num_done else 0.0
