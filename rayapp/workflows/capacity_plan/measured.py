"""Stage costs of a model, measured in this process: prefill chunks, decode steps, and the codec.

What the link itself takes is not measured here but computed from its rate, because this process has
no link.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch

from rayapp.engine.decode import DecodeEngine
from rayapp.engine.prefill import PrefillEngine, PrefillOutput
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import InputError
from rayapp.kv.forecast import forecast_envelope
from rayapp.kv.wire import pack, unpack
from rayapp.models.architecture import text_config
from rayapp.models.hub import locate
from rayapp.models.loading import LoadedModel, load_model
from rayapp.models.stack import BlockStack
from rayapp.plan import PruningPlan
from rayapp.scaling.costs import LinkCost
from rayapp.scaling.meters import DecodeMeter, PrefillMeter
from rayapp.simulation.settings import MeasuringSettings
from rayapp.simulation.stage_costs import StageCosts

_SHORT = 64
_NUM_STEPS = 6
_LONGEST = 2048


def _clock(settings: MeasuringSettings) -> Callable[[], float]:
    """The clock of steps: on one thread the processor's own, which no neighbour slows."""
    return time.process_time if settings.threads == 1 else time.perf_counter


def measured_costs(
    model: str, plan: PruningPlan, settings: MeasuringSettings, name: str
) -> StageCosts:
    """Measure the stages of a plan on this machine.

    Args:
        model: Directory of the model, or its Hub id.
        plan: The plan; an empty one is the dense model.
        settings: What is measured, and what is taken for granted.
        name: Name of the result.

    Raises:
        ModelError: The model cannot be used.
        PlanError: The plan was made for another model.
        InputError: The model's texts are too short to be measured.
    """
    path = locate(model, None).directory
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        loaded = load_model(path, plan=plan, stage="unified", dtype=settings.dtype, packed=True)
        return _measured(loaded, plan, settings, name)
    finally:
        torch.set_num_threads(before)


def _measured(
    loaded: LoadedModel, plan: PruningPlan, settings: MeasuringSettings, name: str
) -> StageCosts:
    limit = min(_LONGEST, text_config(loaded.model.config).max_position_embeddings)
    longest = limit - _NUM_STEPS - 2
    if longest <= _SHORT:
        raise InputError(
            f"the model takes {limit} tokens, and {_SHORT + _NUM_STEPS + 3} are needed to measure "
            "it; write the costs by hand"
        )
    prefill, outputs = _prefill(loaded, plan, settings, (_SHORT, longest))
    decode = _decode(loaded, plan, settings, outputs, limit)
    link, bytes_per_token = _link(outputs[-1], plan, settings)
    return StageCosts(
        name=name,
        prefill=prefill.cost,
        decode=decode.cost,
        link=link,
        prompt_kv_bytes=bytes_per_token,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_num_seqs=settings.max_num_seqs,
        max_entries=settings.max_num_seqs
        * text_config(loaded.model.config).max_position_embeddings,
        cold_start_s=settings.cold_start_s,
    )


def _prompt(loaded: LoadedModel, num_tokens: int) -> GenerationRequest:
    rng = random.Random(num_tokens)
    vocab = text_config(loaded.model.config).vocab_size
    ids = tuple(rng.randrange(vocab) for _ in range(num_tokens))
    # Decode keeps going for as long as it is timed.
    return GenerationRequest(
        f"timed-{num_tokens}", ids, SamplingParams(max_tokens=_NUM_STEPS + 2, ignore_eos=True)
    )


def _prefill(
    loaded: LoadedModel, plan: PruningPlan, settings: MeasuringSettings, lengths: tuple[int, ...]
) -> tuple[PrefillMeter, list[PrefillOutput]]:
    """Run prompts in chunks as a replica would; the meter learns from every step."""
    stack = BlockStack(loaded.model, plan, "prefill")
    engine = PrefillEngine(stack, plan, max_model_len=lengths[-1] + _NUM_STEPS + 2)
    chunk, now = settings.max_num_batched_tokens, _clock(settings)
    meter = PrefillMeter(chunk)
    outputs: list[PrefillOutput] = []
    for length in (*[_SHORT] * 4, *lengths, *lengths):
        run = engine.begin(_prompt(loaded, length))
        ended: list[PrefillOutput] = []
        while not ended:
            count, done = min(chunk, run.num_left), run.kv.num_done
            began_s = now()
            ended = engine.advance([(run, count)])
            meter.observe([(count, done)], now() - began_s)
        outputs += ended
    return meter, outputs[-len(lengths) :]


def _decode(
    loaded: LoadedModel,
    plan: PruningPlan,
    settings: MeasuringSettings,
    outputs: list[PrefillOutput],
    limit: int,
) -> DecodeMeter:
    """Step batches of several sizes over short and long prompts; the meter learns from each."""
    meter, most, now = DecodeMeter(), settings.max_num_seqs, _clock(settings)
    stack = BlockStack(loaded.model, plan, "decode")
    for rows in sorted({1, max(1, most // 4), most}):
        for output in outputs:
            engine = DecodeEngine(stack, plan, max_num_seqs=most, max_model_len=limit)
            for number in range(rows):
                request = _prompt(loaded, output.num_prompt_tokens)
                named = GenerationRequest(f"{number}", request.prompt_token_ids, request.sampling)
                if output.segment is not None:
                    engine.admit(named, output.segment, output.first)
            for _ in range(_NUM_STEPS):
                running = engine.running
                entries = sum(sequence.position for sequence in running)
                began_s = now()
                engine.step()
                meter.observe(len(running), entries, now() - began_s)
    return meter


def _link(
    output: PrefillOutput, plan: PruningPlan, settings: MeasuringSettings
) -> tuple[LinkCost, float]:
    """The cost of a transfer: packing and unpacking, measured, and the link, computed."""
    if output.segment is None:
        return LinkCost(), 0.0
    envelope, now = forecast_envelope(plan), _clock(settings)
    began_s = now()
    message = pack(output.segment, envelope)
    unpack(message, envelope)
    codec_s = now() - began_s
    byte_s = codec_s / message.nbytes + 8e-9 / settings.gbit_per_s
    return LinkCost(byte_s=byte_s), message.nbytes / output.num_prompt_tokens
