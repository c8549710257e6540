"""Seconds and bytes of plans on this machine, in turns with the dense model."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hardware.clock import Clock
from hardware.turns import in_turns
from transformers import PreTrainedModel

from handoff.gains import Costs
from rayapp.engine.decode import DecodeEngine
from rayapp.engine.prefill import PrefillEngine, PrefillOutput
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import IntegrityError
from rayapp.kv.forecast import forecast_envelope
from rayapp.kv.wire import pack, unpack
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan


@dataclass(frozen=True)
class Sizes:
    """The request that is timed, and how often."""

    num_prompt_tokens: int
    num_steps: int
    num_runs: int
    seed: int = 0


@dataclass
class _Side:
    """Engines of one plan, and the seconds of its runs."""

    prefill: PrefillEngine
    decode: DecodeEngine
    plan: PruningPlan
    seconds: dict[str, list[float]] = field(default_factory=dict)
    num_bytes: int = 0
    num_entries: int = 0


def timed_costs(
    model: PreTrainedModel, plans: Mapping[str, PruningPlan], sizes: Sizes, clock: str
) -> dict[str, Costs]:
    """Medians over runs, all plans in turns on one random prompt.

    Plans that run the same prefill share its median over all their runs, as do those whose decode
    runs the same blocks over equally many entries.

    Args:
        model: The model, on the CPU.
        plans: Plans by name.
        sizes: The request.
        clock: ``wall``, or ``cpu`` for the processor seconds of this process.
    """
    rng = random.Random(sizes.seed)
    prompt = tuple(rng.choices(range(model.config.vocab_size), k=sizes.num_prompt_tokens))
    params = SamplingParams(max_tokens=sizes.num_steps + 1, ignore_eos=True)
    request = GenerationRequest("timed", prompt, params)
    sides = {name: _side(model, plan, sizes) for name, plan in plans.items()}
    for name, counts in in_turns(list(sides), sizes.num_runs):
        seconds = _run(sides[name], request, Clock(model.device, clock))
        if counts:
            for part, value in seconds.items():
                sides[name].seconds.setdefault(part, []).append(value)
    return {
        name: _costs(side, list(sides.values()), sizes.num_steps) for name, side in sides.items()
    }


def _side(model: PreTrainedModel, plan: PruningPlan, sizes: Sizes) -> _Side:
    limit = sizes.num_prompt_tokens + sizes.num_steps + 1
    prefill = PrefillEngine(BlockStack(model, plan, "prefill"), plan, max_model_len=limit)
    stack = BlockStack(model, plan, "decode")
    return _Side(prefill, DecodeEngine(stack, plan, max_num_seqs=1, max_model_len=limit), plan)


def _run(side: _Side, request: GenerationRequest, clock: Clock) -> dict[str, float]:
    """Seconds of prefill, of packing and unpacking, and of all decode steps."""
    output: PrefillOutput = side.prefill.run(request)
    prefill_s = clock.lap()
    if output.segment is None:
        raise IntegrityError("the timed answer ended with its first token")
    envelope = forecast_envelope(side.plan)
    message = pack(output.segment, envelope)
    segment = unpack(message, envelope)
    codec_s = clock.lap()
    side.num_bytes = message.nbytes
    side.num_entries = sum(entry.num_entries for entry in segment.blocks)
    side.decode.admit(request, segment, output.first)
    clock.lap()
    while side.decode.num_running:
        side.decode.step()
    return {"prefill_s": prefill_s, "codec_s": codec_s, "decode_s": clock.lap()}


def _costs(side: _Side, sides: Sequence[_Side], num_steps: int) -> Costs:
    """Medians of one side, over the runs of all sides that compute the same."""

    def median(part: str, same: Callable[[_Side], object]) -> float:
        alike = [each for each in sides if same(each) == same(side)]
        return statistics.median(s for each in alike for s in each.seconds[part])

    return Costs(
        prefill_s=median("prefill_s", lambda each: each.plan.prefill),
        tpot_s=median("decode_s", lambda each: (each.plan.decode, each.num_entries)) / num_steps,
        codec_s=median("codec_s", id),
        num_bytes=side.num_bytes,
    )
