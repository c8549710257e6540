"""Prompts that share a pass of prefill: the tokens and KV that each has alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from rayapp.engine.decode import DecodeEngine
from rayapp.engine.local import ImagePrompt, LocalPipeline
from rayapp.engine.prefill import PrefillEngine, PrefillOutput
from rayapp.engine.request import GenerationRequest
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import RequestError
from rayapp.models.blocks import signature_of
from rayapp.models.stack import BlockStack
from rayapp.plan import KVTransfer, Mode, PruningPlan, StagePlan, VisualTokens
from rayapp.vision.llava import LlavaAdapter

PLACE = 290
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
# Both stages miss parts, and blocks send their KV in three ways.
CUT = {
    "prefill": {1: "kv_only", 3: "removed"},
    "decode": {3: "mlp_only"},
    "kv_transfer": {0: {"first": 2, "last": 9}, 2: {"encoding": "int8"}},
}

Make = Callable[..., Any]


def ask(name: str, prompt: Sequence[int], **sampling: Any) -> GenerationRequest:
    return GenerationRequest(name, tuple(prompt), SamplingParams(**sampling))


def run_together(prefill: PrefillEngine, requests: list[GenerationRequest]) -> list[PrefillOutput]:
    return prefill.run_embedded(requests, [prefill.embed(request) for request in requests])


def check_equal(found: PrefillOutput, alone: PrefillOutput) -> None:
    assert found.num_prompt_tokens == alone.num_prompt_tokens
    assert (found.first is None, found.segment is None) == (
        alone.first is None,
        alone.segment is None,
    )
    if found.first is not None:
        assert (found.first.request_id, found.first.token_ids, found.first.finish_reason) == (
            alone.first.request_id, alone.first.token_ids, alone.first.finish_reason,
        )  # fmt: skip
        assert len(found.first.logprobs) == len(alone.first.logprobs)
        for one, other in zip(found.first.logprobs, alone.first.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
    if found.segment is None:
        return
    for one, other in zip(found.segment.blocks, alone.segment.blocks, strict=True):
        assert (one.block, one.encoding) == (other.block, other.encoding)
        assert torch.equal(one.positions_N, other.positions_N)
        torch.testing.assert_close(one.keys_HND, other.keys_HND, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.values_HND, other.values_HND, rtol=1e-4, atol=1e-4)
    assert found.segment.extent == alone.segment.extent
    assert found.segment.num_visual_tokens_removed == alone.segment.num_visual_tokens_removed


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_texts_together_are_texts_alone(
    family: str, first_token: str, tiny_model: Make, engines: Make, make_plan: Make
) -> None:
    model = tiny_model(family)
    plan = make_plan(model, first_token=first_token, **CUT)
    prefill = engines(model, plan).prefill
    generator = torch.Generator().manual_seed(3)
    options = [{}, {"max_tokens": 1}, {"logprobs": 2}, {"temperature": 1.0, "seed": 5}]
    requests = [
        ask(str(n), torch.randint(0, 250, (17,), generator=generator).tolist(), **o)
        for n, o in enumerate(options)
    ]
    for output, request in zip(run_together(prefill, requests), requests, strict=True):
        check_equal(output, prefill.run(request))


def test_a_prompt_of_one_token_has_nothing_to_run(
    tiny_model: Make, engines: Make, make_plan: Make
) -> None:
    model = tiny_model("llama")
    prefill = engines(model, make_plan(model, first_token="decode")).prefill
    for output in run_together(prefill, [ask("a", [1]), ask("b", [2])]):
        assert output.first is None
        assert (output.segment.num_prefilled, output.segment.nbytes) == (0, 0)


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_chunks_of_unequal_prompts_are_the_prompts_alone(
    family: str, first_token: str, tiny_model: Make, engines: Make, make_plan: Make
) -> None:
    """Chunks of one token up to whole prompts, several prompts a pass, windows that they cross."""
    model = tiny_model(family)
    plan = make_plan(model, first_token=first_token, **CUT)
    prefill = engines(model, plan).prefill
    rng = random.Random(11)
    lengths = [1, 2, 3, 17, 18, 33, 40]
    requests = [
        ask(str(n), [rng.randrange(250) for _ in range(length)]) for n, length in enumerate(lengths)
    ]
    for largest in (1, 5, 64):
        runs = {request.request_id: prefill.begin(request) for request in requests}
        outputs: dict[str, PrefillOutput] = {}
        while runs:
            chosen = rng.sample(sorted(runs), rng.randint(1, len(runs)))
            chunks = [
                (runs[name], min(runs[name].num_left, rng.randint(1, largest))) for name in chosen
            ]
            ended = iter(prefill.advance(chunks))
            outputs.update({n: next(ended) for n in chosen if not runs[n].num_left})
            runs = {name: run for name, run in runs.items() if name not in outputs}
        for request in requests:
            check_equal(outputs[request.request_id], prefill.run(request))


def test_a_request_outside_the_limits_is_refused_before_the_pass(
    tiny_model: Make, engines: Make
) -> None:
    prefill = engines(tiny_model("llama")).prefill
    prompt = prefill.embed(ask("a", [1, 2]))
    with pytest.raises(RequestError, match="vocabulary"):
        prefill.run_embedded([ask("a", [1, 2]), ask("b", [1, 9999])], [prompt, prompt])


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_image_prompts_together_answer_as_the_pipeline(
    text: str, positions: Any, llava: Make, processor: Make, encoded_image: Make
) -> None:
    """Equally many tokens are kept, at other places of each image: positions differ by row."""
    model = llava("llava", text)
    plan = PruningPlan(
        model=signature_of(model),
        visual_tokens=VisualTokens(num_keep=7, positions=positions),
        prefill=StagePlan(blocks={1: Mode.KV_ONLY}),
        kv_transfer={0: KVTransfer(first=3, last=5)},
    )
    pipe = LocalPipeline(model, None, plan, image_processor=processor("llava"))
    words = [(11, 12), (13, 14), (15, 16), (17, 18)]
    prompts = [
        ImagePrompt((1, PLACE, 2, *words[n]), [encoded_image(n)], words[n]) for n in range(4)
    ]
    expected = pipe.generate(prompts, GREEDY)
    requests = pipe._requests(prompts, GREEDY)
    adapter = LlavaAdapter(model, pipe.prefill.stack, processor("llava"))
    pictures = [pipe.images.intake.decode(request.images[0]) for request in requests]
    encoded = adapter.encode_prepared(adapter.prepare(pictures))
    ran = adapter.embed_prompts(
        [r.prompt_token_ids for r in requests], [[image] for image in encoded], plan.visual_tokens,
        texts=[r.text_token_ids for r in requests],
    )  # fmt: skip
    assert len({tuple(prompt.positions_T.tolist()) for prompt in ran}) == (
        len(prompts) if positions == "original" else 1
    )
    outputs = pipe.prefill.run_embedded(requests, ran)
    for output, request in zip(outputs, requests, strict=True):
        check_equal(output, pipe.prefill.run(request))
    assert answers(model, plan, requests, outputs) == [list(one.token_ids) for one in expected]


def answers(
    model: Any,
    plan: PruningPlan,
    requests: list[GenerationRequest],
    outputs: list[PrefillOutput],
) -> list[list[int]]:
    stack = BlockStack(model, plan, "decode")
    decode = DecodeEngine(stack, plan, max_num_seqs=len(requests), max_model_len=64)
    found = {r.request_id: list(o.first.token_ids) for r, o in zip(requests, outputs, strict=True)}
    for request, output in zip(requests, outputs, strict=True):
        decode.admit(request, output.segment, output.first)
    while decode.num_running:
        for batch in decode.step():
            found[batch.request_id] += batch.token_ids
    return list(found.values())
