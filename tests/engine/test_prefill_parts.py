"""KV that leaves in groups of blocks while a pass runs equals KV that is sent whole, bit for bit.

The oracle is the same pass without any cut: chunks of other sizes round otherwise.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from rayapp.engine.prefill import PrefillEngine, PrefillOutput, PrefillRun
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.engine.sequences.running import AnswerStart
from rayapp.errors import WireError
from rayapp.kv.parts import Part, joined
from rayapp.kv.pieces import Message
from rayapp.kv.segment import KVSegment
from rayapp.kv.wire import Envelope, pack, unpack

Make = Callable[..., Any]
SENT = Envelope("r", 0, "p", "w")
LENGTHS = (150, 70, 9)  # More than two groups of scales, more than one, and less.
LIMIT = 256
PLANS: dict[str, dict[str, Any]] = {
    "dense": {},
    "blocks skipped": {
        "prefill": {1: "removed", 3: "mlp_only"},
        "decode": {1: "removed", 3: "mlp_only"},
    },
    "kv only": {"prefill": {0: "kv_only", 3: "kv_only"}},
    "mlp and kv": {"prefill": {1: "mlp_and_kv", 2: "kv_only"}, "decode": {0: "removed"}},
    "ends": {"kv_transfer": {0: {"first": 70, "last": 20}, 2: {"first": 4}, 3: {"last": 0.5}}},
    "int8": {"kv_transfer": {b: {"encoding": "int8"} for b in range(4)}},
    "int4 and ends": {
        "kv_transfer": {
            0: {"first": 66, "last": 30, "encoding": "int4"},
            1: {"encoding": "int4"},
            3: {"last": 65, "encoding": "int8"},
        }
    },
}


def requests_of(**sampling: Any) -> list[GenerationRequest]:
    generator = torch.Generator().manual_seed(7)
    ids = [torch.randint(0, 250, (n,), generator=generator).tolist() for n in LENGTHS]
    params = SamplingParams(max_tokens=6, ignore_eos=True, **sampling)
    return [GenerationRequest(str(n), tuple(prompt), params) for n, prompt in enumerate(ids)]


def run_all(
    engine: PrefillEngine, runs: Sequence[PrefillRun], chunk: int, noted: Any = None
) -> list[PrefillOutput]:
    """Every prompt in chunks of so many tokens, all of them in the same passes."""
    outputs: dict[str, PrefillOutput] = {}
    while left := [run for run in runs if run.num_left]:
        chunks = [(run, min(chunk, run.num_left)) for run in left]
        ended = iter(engine.advance(chunks, noted))
        outputs.update(
            {run.requests[0].request_id: next(ended) for run in left if not run.num_left}
        )
    return [outputs[run.requests[0].request_id] for run in runs]


class Collected:
    """Parts of several prompts, packed as they are cut."""

    def __init__(self, runs: Sequence[PrefillRun], least_bytes: int) -> None:
        self._runs = runs
        self._least_bytes = least_bytes
        self.messages: list[list[Message]] = [[] for _ in runs]

    def look(self) -> None:
        for number, run in enumerate(self._runs):
            part = run.cut(least_bytes=self._least_bytes)
            if part is not None:
                self._add(number, part)

    def _add(self, number: int, part: Part) -> None:
        sent = replace(SENT, part=len(self.messages[number]), is_last=False)
        self.messages[number].append(pack(part.segment(), sent))

    def received(self, outputs: Sequence[PrefillOutput]) -> list[list[KVSegment]]:
        """All parts as decode gets them; their checksums cover memory that was seen before."""
        found = []
        for messages, output in zip(self.messages, outputs, strict=True):
            assert output.segment is not None
            last = replace(SENT, part=len(messages))
            parts = [
                unpack(message, replace(SENT, part=number, is_last=False))
                for number, message in enumerate(messages)
            ]
            found.append([*parts, unpack(pack(output.segment, last), last)])
        return found


def assert_equal(found: KVSegment, wanted: KVSegment) -> None:
    assert found.extent == wanted.extent
    for ours, theirs in zip(found.blocks, wanted.blocks, strict=True):
        assert (ours.block, ours.encoding) == (theirs.block, theirs.encoding)
        assert torch.equal(ours.positions_N, theirs.positions_N)
        assert torch.equal(ours.keys_HND, theirs.keys_HND)
        assert torch.equal(ours.values_HND, theirs.values_HND)


def tokens_of(outputs: Sequence[PrefillOutput]) -> list[tuple[int, ...]]:
    return [first.token_ids for output in outputs for first in output.firsts]


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_groups_of_blocks_equal_the_segment_sent_whole(
    family: str, plan: str, first_token: str, tiny_model: Make, engines: Make, make_plan: Make
) -> None:
    """Of several prompts in one pass, and of chunks, which later passes go on from."""
    model = tiny_model(family, **({"sliding_window": 80} if family == "mistral" else {}))
    made = make_plan(model, first_token=first_token, **PLANS[plan])
    engine = engines(model, made, max_model_len=LIMIT).prefill
    for chunk, least_bytes in ((LIMIT, 1), (66, 1), (LIMIT, 9000)):
        whole = run_all(engine, [engine.begin(r) for r in requests_of()], chunk)
        runs = [engine.begin(r, in_parts=True) for r in requests_of()]
        collected = Collected(runs, least_bytes)
        outputs = run_all(engine, runs, chunk, collected.look)
        assert tokens_of(outputs) == tokens_of(whole)
        for parts, output in zip(collected.received(outputs), whole, strict=True):
            assert output.segment is not None
            assert_equal(joined(parts), unpack(pack(output.segment, SENT), SENT))
        assert len(collected.messages[0]) > 1


def test_packing_beside_the_pass_sees_entries_that_do_not_change(
    tiny_model: Make, engines: Make
) -> None:
    """Blocks are packed on another thread while the engine computes those after them."""
    engine = engines(tiny_model("mistral"), max_model_len=LIMIT).prefill
    whole = run_all(engine, [engine.begin(r) for r in requests_of()], 40)
    runs = [engine.begin(r, in_parts=True) for r in requests_of()]
    # Of size one: on a busy machine the other thread would else look once, when all is computed.
    collected, looks = Collected(runs, 1), queue.Queue[bool](maxsize=1)

    def look() -> None:
        while looks.get():
            collected.look()

    packing = threading.Thread(target=look)
    packing.start()
    outputs = run_all(engine, runs, 40, lambda: looks.put(True))
    looks.put(False)
    packing.join()
    assert sum(map(len, collected.messages)) > 1
    for parts, output in zip(collected.received(outputs), whole, strict=True):
        assert output.segment is not None
        assert_equal(joined(parts), unpack(pack(output.segment, SENT), SENT))


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("plan", ["dense", "mlp and kv", "int4 and ends"])
def test_decode_answers_from_groups_as_from_the_whole(
    family: str, plan: str, tiny_model: Make, engines: Make, make_plan: Make
) -> None:
    model = tiny_model(family)
    both = engines(model, make_plan(model, **PLANS[plan]), max_model_len=LIMIT)
    requests = requests_of(temperature=0.8, seed=3)
    both.answers = {request.request_id: [] for request in requests}
    whole = run_all(both.prefill, [both.prefill.begin(r) for r in requests], LIMIT)
    for request, output in zip(requests, whole, strict=True):
        both.take(output.first)
        both.decode.admit(request, unpack(pack(output.segment, SENT), SENT), output.first)
    both.drain()
    wanted, both.answers = both.answers, {request.request_id: [] for request in requests}
    runs = [both.prefill.begin(request, in_parts=True) for request in requests]
    collected = Collected(runs, 1)
    outputs = run_all(both.prefill, runs, LIMIT, collected.look)
    for request, output, parts in zip(requests, outputs, collected.received(outputs), strict=True):
        reservation = both.decode.reserve([request], parts[0].extent)
        for part in parts:
            reservation.load(part)
        both.take(output.first)
        both.decode.commit(reservation, [AnswerStart(request, output.first)])
    both.drain()
    assert both.answers == wanted


def parts_of_blocks(both: Any, request: GenerationRequest) -> tuple[list[KVSegment], Any]:
    runs = [both.prefill.begin(request, in_parts=True)]
    collected = Collected(runs, 1)
    outputs = run_all(both.prefill, runs, LIMIT, collected.look)
    (parts,) = collected.received(outputs)
    return parts, outputs[0]


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize(
    "fault", ["twice", "missing", "last twice", "other positions", "another's"]
)
def test_groups_that_do_not_follow_one_another_are_never_decoded(
    fault: str, window: bool, tiny_model: Make, engines: Make
) -> None:
    both = engines(tiny_model("mistral" if window else "llama"), max_model_len=LIMIT)
    request, other, _ = requests_of()
    parts, output = parts_of_blocks(both, request)
    if fault == "twice":
        parts.insert(1, parts[0])
    elif fault == "missing":
        del parts[1]
    elif fault == "last twice":
        parts.append(parts[-1])
    elif fault == "other positions":
        moved = [replace(b, positions_N=b.positions_N + 1) for b in parts[1].blocks]
        parts[1] = replace(parts[1], blocks=tuple(moved))
    else:
        parts[1] = parts_of_blocks(both, other)[0][1]
    reservation = both.decode.reserve([request], parts[0].extent)

    def decode() -> None:
        for part in parts:
            reservation.load(part)
        both.decode.commit(reservation, [AnswerStart(request, output.first)])

    with pytest.raises(WireError, match="prefill again"):
        decode()
    both.decode.release(reservation)
    assert not both.decode.num_running
    both.decode.check_integrity()
    both.start(request)  # The pages are as good as new.
    both.drain()
