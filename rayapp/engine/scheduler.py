"""The scheduler decides what a replica's next step computes: who, and how many tokens of each.

It is plain logic over names and numbers of tokens. A step has a budget of tokens. Every running
sequence takes one of them first, so no stream of an answer stands still for more than the chunks of
one step; prompts get the rest. A long prompt is computed in chunks, and between two chunks shorter
prompts take their turn.

The prompt with the fewest tokens left goes first: that order has the least mean waiting time.
Without more it would let a long prompt starve, so waiting counts: every token that the engine
computes for others makes a prompt ``_AGEING`` tokens shorter in the order (project default). A
prompt with N tokens left therefore waits for at most ``N / _AGEING`` tokens of prompts that came
after it.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayapp.errors import IntegrityError

_AGEING = 0.25


@dataclass(frozen=True)
class Chunk:
    """The next ``num_tokens`` tokens of a prompt; ``is_first`` and ``is_last`` tell its ends."""

    name: str
    num_tokens: int
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class Step:
    """One step: a token of each of ``num_running`` sequences, then the chunks of prompts."""

    num_running: int
    chunks: tuple[Chunk, ...]

    def __bool__(self) -> bool:
        """True if the step computes anything."""
        return bool(self.num_running or self.chunks)


@dataclass
class _Prompt:
    num_left: int
    arrived_at: int
    number: int
    has_begun: bool = False


class Scheduler:
    """The order of the work of one replica.

    Args:
        max_num_batched_tokens: Tokens that one step may compute. However many sequences run, a
            prompt gets at least one of them, so that it never starves.

    Attributes:
        max_tokens: Tokens that one step may compute.
    """

    def __init__(self, max_num_batched_tokens: int) -> None:
        self.max_tokens = max_num_batched_tokens
        self._prompts: dict[str, _Prompt] = {}
        self._num_added = 0
        self._num_computed = 0

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def num_begun(self) -> int:
        """Number of prompts of which a chunk was scheduled, but not the last one."""
        return sum(prompt.has_begun for prompt in self._prompts.values())

    @property
    def num_waiting(self) -> int:
        """Number of prompts of which nothing was scheduled yet."""
        return len(self._prompts) - self.num_begun

    @property
    def num_tokens(self) -> int:
        """Number of tokens that are still to be scheduled."""
        return sum(prompt.num_left for prompt in self._prompts.values())

    def num_left(self, name: str) -> int:
        """Number of tokens of a prompt that are still to be scheduled; 0 for an unknown one."""
        prompt = self._prompts.get(name)
        return prompt.num_left if prompt else 0

    def add(self, name: str, num_tokens: int) -> None:
        """Add a prompt with ``num_tokens`` tokens to compute, at least one.

        Raises:
            IntegrityError: The name is taken, or there is nothing to compute.
        """
        if name in self._prompts or num_tokens < 1:
            raise IntegrityError(f"prompt {name!r} of {num_tokens} tokens cannot be scheduled")
        self._prompts[name] = _Prompt(num_tokens, self._num_computed, self._num_added)
        self._num_added += 1

    def remove(self, name: str) -> bool:
        """Forget a prompt; return whether it was known."""
        return self._prompts.pop(name, None) is not None

    def next_step(self, num_running: int = 0) -> Step:
        """Return the next step and count its chunks as computed; it is false if there is no work.

        Prompts whose last chunk this is are forgotten.

        Args:
            num_running: Sequences that run, each of which computes one token.
        """
        chunks: list[Chunk] = []
        budget = num_left = max(1, self.max_tokens - num_running)
        for name in sorted(self._prompts, key=self._rank):
            if not num_left:
                break
            prompt = self._prompts[name]
            count = min(prompt.num_left, num_left)
            prompt.num_left -= count
            num_left -= count
            chunks.append(Chunk(name, count, not prompt.has_begun, not prompt.num_left))
            prompt.has_begun = True
        for chunk in chunks:
            if chunk.is_last:
                del self._prompts[chunk.name]
        self._num_computed += budget - num_left
        return Step(num_running, tuple(chunks))

    def _rank(self, name: str) -> tuple[float, int]:
        prompt = self._prompts[name]
        waited = self._num_computed - prompt.arrived_at
        return prompt.num_left - _AGEING * waited, prompt.number
