"""Prompts with images through the whole path, against the plain model's own generate."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from rayapp.engine.local import ImagePrompt, LocalPipeline
from rayapp.engine.sampling_params import SamplingParams
from rayapp.errors import PlanError, RequestError
from rayapp.kv.ledger import KVShape
from rayapp.models.blocks import signature_of
from rayapp.plan import KVTransfer, Mode, PruningPlan, StagePlan, VisualTokens
from rayapp.vision.limits import ImageLimits

KINDS = ("llava", "llava_next")
PLACE = 290
QUESTION = (11, 12, 13, 14, 15)
ONE = (1, 2, PLACE, 3, *QUESTION, 4)
TWO = (1, PLACE, 2, PLACE, *QUESTION, 4)
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)

Make = Callable[..., Any]


@pytest.fixture
def pipeline(llava: Make, processor: Make) -> Make:
    """``pipeline(kind, text="llama", **plan)``: a pipeline under a plan of that model."""

    def build(kind: str, text: str = "llama", **plan: Any) -> LocalPipeline:
        model = llava(kind, text)
        plan = {"model": signature_of(model), **plan} if plan else {}
        return LocalPipeline(model, None, PruningPlan(**plan), image_processor=processor(kind))

    return build


def asking(token_ids: tuple[int, ...], images: list[bytes], **options: Any) -> ImagePrompt:
    return ImagePrompt(token_ids, images, QUESTION, **options)


def dense_inputs(pipe: LocalPipeline, processor: Any, prompt: ImagePrompt) -> dict[str, Any]:
    """The arguments of a call of the plain model: repeated placeholders, and pixels."""
    taken = pipe.images.intake.take_all(prompt.images)
    counts, ids = iter(taken), []
    for token in prompt.prompt:
        ids += [token] * (next(counts).num_tokens if token == PLACE else 1)
    pixels = [Image.open(io.BytesIO(data)).convert("RGB") for data in prompt.images]
    encoded = processor(images=pixels, return_tensors="pt")
    return {"input_ids": torch.tensor([ids]), **encoded}


def generated(model: PreTrainedModel, **inputs: Any) -> tuple[int, ...]:
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    given = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return tuple(out[given:].tolist())


@pytest.mark.parametrize("rule", [None, VisualTokens(num_keep=1.0), VisualTokens(num_keep=10_000)])
@pytest.mark.parametrize("kind", KINDS)
def test_keeping_all_answers_as_generate_does(
    kind: str, rule: Any, pipeline: Make, llava: Make, processor: Make, encoded_image: Make
) -> None:
    pipe = pipeline(kind, **({"visual_tokens": rule} if rule else {}))
    images = [encoded_image(0, 40, 16), encoded_image(1, 20, 33, form="JPEG")]
    for prompt in (asking(ONE, images[:1]), asking(TWO, images)):
        inputs = dense_inputs(pipe, processor(kind), prompt)
        (answer,) = pipe.generate([prompt], GREEDY)
        assert answer.token_ids == generated(llava(kind), **inputs)
        assert answer.transfer is not None
        assert answer.transfer.num_prompt_tokens == inputs["input_ids"].shape[1]
        assert answer.transfer.saved_by_visual_tokens_bytes == 0


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("text", ["llama", "mistral"])
@pytest.mark.parametrize("kind", KINDS)
def test_original_positions_answer_as_the_masked_model(
    kind: str,
    text: str,
    first_token: str,
    pipeline: Make,
    llava: Make,
    processor: Make,
    encoded_image: Make,
) -> None:
    pipe = pipeline(kind, text, visual_tokens=VisualTokens(num_keep=6), first_token=first_token)
    prompt = asking(TWO, [encoded_image(2, 40, 16), encoded_image(3)])
    (answer,) = pipe.generate([prompt], GREEDY)
    request = pipe._requests([prompt], GREEDY)[0]
    ran = pipe.prefill.embed(request)
    inputs = dense_inputs(pipe, processor(kind), prompt)
    total = inputs["input_ids"].shape[1]
    assert request.num_prompt_tokens == total
    model = llava(kind, text)
    mask = torch.zeros(1, total, dtype=torch.int64)
    mask[0, ran.positions_T] = 1
    tokens: list[int] = []
    for _ in range(GREEDY.max_tokens):  # no cache: every step runs the whole masked sequence
        step = {**inputs, "input_ids": torch.tensor([[*inputs["input_ids"][0].tolist(), *tokens]])}
        length = total + len(tokens)
        seen = torch.cat([mask, torch.ones(1, len(tokens), dtype=torch.int64)], dim=1)
        with torch.inference_mode():
            logits = model(
                **step, attention_mask=seen, position_ids=torch.arange(length)[None]
            ).logits
        tokens.append(int(logits[0, -1].argmax()))
    assert answer.token_ids == tuple(tokens)
    assert answer.token_ids != generated(model, **inputs)


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("kind", KINDS)
def test_compact_positions_answer_as_generate_on_what_is_kept(
    kind: str, first_token: str, pipeline: Make, llava: Make, encoded_image: Make
) -> None:
    rule = VisualTokens(num_keep=6, positions="compact")
    pipe = pipeline(kind, visual_tokens=rule, first_token=first_token)
    prompt = asking(ONE, [encoded_image(4, 16, 50)])
    (answer,) = pipe.generate([prompt], GREEDY)
    ran = pipe.prefill.embed(pipe._requests([prompt], GREEDY)[0])
    assert ran.num_visual_tokens_removed > 0
    expected = generated(
        llava(kind),
        inputs_embeds=ran.hidden_TE[None],
        attention_mask=torch.ones(1, ran.num_tokens, dtype=torch.int64),
    )
    assert answer.token_ids == expected


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_says_what_visual_pruning_saved(
    kind: str, positions: str, pipeline: Make, encoded_image: Make
) -> None:
    rule = VisualTokens(num_keep=5, positions=positions)
    decode = StagePlan(blocks={1: Mode.MLP_ONLY})
    pipe = pipeline(
        kind,
        visual_tokens=rule,
        decode=decode,
        kv_transfer={0: KVTransfer(first=2, last=6), 2: KVTransfer(encoding="int8")},
    )
    prompt = asking(ONE, [encoded_image(5, 40, 16)])
    (answer,) = pipe.generate([prompt], GREEDY)
    ran = pipe.prefill.embed(pipe._requests([prompt], GREEDY)[0])
    record = answer.transfer
    assert record is not None
    shape = KVShape.of(pipe.prefill.stack)
    removed = ran.num_visual_tokens_removed
    assert removed > 0
    assert record.num_visual_tokens_removed == removed
    assert record.bytes_full == shape.dense_bytes(ran.num_tokens + removed)
    assert record.saved_by_visual_tokens_bytes == shape.dense_bytes(removed)
    assert record.saved_by_blocks_bytes == shape.dense_bytes(ran.num_tokens, [1])
    assert record.saved_by_tokens_bytes == (ran.num_tokens - 8) * shape.entry_bytes
    assert record.saved_by_encoding_bytes > 0
    saved = sum(v for k, v in vars(record).items() if k.startswith("saved_by"))
    assert record.bytes_full == record.bytes_sent - record.overhead_bytes + saved


@pytest.mark.parametrize("kind", KINDS)
def test_visual_pruning_combines_with_blocks_cuts_and_encodings(
    kind: str, pipeline: Make, llava: Make, encoded_image: Make
) -> None:
    """Equal to the same plan without visual pruning on the embeddings that are kept (compact)."""
    parts = {
        "prefill": StagePlan(blocks={1: Mode.KV_ONLY}),
        "decode": StagePlan(blocks={2: Mode.ATTENTION_ONLY}),
        "kv_transfer": {0: KVTransfer(first=3, last=5), 1: KVTransfer(encoding="int4")},
    }
    rule = VisualTokens(num_keep=6, positions="compact")
    pruned, plain = pipeline(kind, visual_tokens=rule, **parts), pipeline(kind, **parts)
    prompt = asking(ONE, [encoded_image(6, 40, 16)])
    (answer,) = pruned.generate([prompt], GREEDY)
    embedded = pruned.prefill.embed(pruned._requests([prompt], GREEDY)[0])
    # The kept embeddings as words: one new row of the embedding table each.
    table = plain.prefill.stack._decoder.embed_tokens
    ids = tuple(range(200, 200 + embedded.num_tokens))
    assert max(ids) < PLACE
    table.weight.data[list(ids)] = embedded.hidden_TE
    logits = plain.answer_logits(ids, answer.token_ids)
    assert torch.allclose(pruned.answer_logits(prompt, answer.token_ids), logits, atol=1e-4)


def test_a_request_may_choose_its_own_rule(pipeline: Make, encoded_image: Make) -> None:
    image = [encoded_image(7)]
    pruning = pipeline("llava", visual_tokens=VisualTokens(num_keep=3))
    dense = pipeline("llava")
    everything = asking(ONE, image, visual_tokens=VisualTokens(num_keep=1.0))
    fewer = asking(ONE, image, visual_tokens=VisualTokens(num_keep=3))
    all_kept, own = pruning.generate([everything, asking(ONE, image)], GREEDY)
    plain, same = dense.generate([asking(ONE, image), fewer], GREEDY)
    assert all_kept.token_ids == plain.token_ids
    assert own.token_ids == same.token_ids != plain.token_ids
    assert [a.transfer.num_visual_tokens_removed for a in (all_kept, own)] == [0, 13]


def test_requests_with_and_without_images_share_a_batch(
    pipeline: Make, encoded_image: Make
) -> None:
    pipe = pipeline("llava_next", visual_tokens=VisualTokens(num_keep=0.25))
    prompts = [
        asking(ONE, [encoded_image(8, 40, 16)]),
        (1, 2, 3, 4),
        asking(TWO, [encoded_image(9), encoded_image(10)]),
        (7,),
    ]
    together = pipe.generate(prompts, GREEDY)
    alone = [pipe.generate([prompt], GREEDY)[0] for prompt in prompts]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]


def test_the_tower_runs_once_per_image_content(pipeline: Make, encoded_image: Make) -> None:
    pipe = pipeline("llava", visual_tokens=VisualTokens(num_keep=4))
    runs: list[int] = []
    tower = pipe.images._adapter._model.model.vision_tower
    tower.register_forward_hook(lambda *_: runs.append(1))
    image, other = encoded_image(11), encoded_image(12)
    pipe.generate([asking(ONE, [image]), asking(TWO, [image, image])], GREEDY)
    assert len(runs) == 1
    pipe.generate([asking(TWO, [other, image])], GREEDY)
    assert len(runs) == 2
    again = VisualTokens(method="cls_attention", num_keep=4)
    pipe.generate([asking(ONE, [image], visual_tokens=again)], GREEDY)
    assert len(runs) == 3  # its attention was not kept the first time
    pipe.generate([asking(ONE, [image], visual_tokens=again), asking(ONE, [image])], GREEDY)
    assert len(runs) == 3


def test_the_cache_holds_no_more_than_its_bytes(pipeline: Make, encoded_image: Make) -> None:
    pipe = pipeline("llava")
    cache = pipe.images.cache
    pipe.generate([asking(ONE, [encoded_image(20)])], GREEDY)
    size = cache.nbytes
    cache.max_bytes = 2 * size
    images = [encoded_image(seed) for seed in range(20, 24)]
    first = pipe.generate([asking(ONE, [image]) for image in images], GREEDY)
    assert (len(cache), cache.nbytes) == (2, 2 * size)
    cache.max_bytes = size - 1
    assert [a.token_ids for a in pipe.generate([asking(ONE, [i]) for i in images], GREEDY)] == [
        a.token_ids for a in first
    ]
    assert (len(cache), cache.nbytes) == (0, 0)


@pytest.mark.parametrize(
    ("token_ids", "num_images", "says"),
    [
        (ONE, 0, "placeholders"),
        (ONE, 2, "placeholders"),
        ((1, 2, 3), 1, "placeholders"),
        ((PLACE,) * 9, 9, "at most 8"),
    ],
)
def test_placeholders_and_images_must_match(
    token_ids: Any, num_images: int, says: str, pipeline: Make, encoded_image: Make
) -> None:
    prompt = asking(token_ids, [encoded_image(0)] * num_images)
    with pytest.raises(RequestError, match=says):
        pipeline("llava").generate([prompt], GREEDY)
    if not num_images:
        with pytest.raises(RequestError, match=says):
            pipeline("llava").generate([token_ids], GREEDY)


def test_bad_input_is_refused(pipeline: Make, encoded_image: Make, tiny_model: Make) -> None:
    pipe = pipeline("llava")
    with pytest.raises(RequestError, match="no PNG, JPEG or WebP"):
        pipe.generate([asking(ONE, [b"GIF89a"])], GREEDY)
    with pytest.raises(RequestError, match="cannot be decoded"):
        pipe.generate([asking(ONE, [encoded_image(0)[:200]])], GREEDY)
    with pytest.raises(RequestError, match="places"):
        LocalPipeline(
            pipe.images._adapter._model, None, image_processor=pipe.images._adapter._process,
            max_model_len=24,
        ).generate([asking(ONE, [encoded_image(0)])], GREEDY)  # fmt: skip
    with pytest.raises(RequestError, match="text-only"):
        LocalPipeline(tiny_model("llama")).generate([asking((1, 2), [encoded_image(0)])], GREEDY)
    with pytest.raises(RequestError, match="put text after"):
        pipeline("llava", first_token="decode").generate(
            [asking((1, PLACE), [encoded_image(0)])], GREEDY
        )
    assert ImageLimits().max_images == 8


def test_a_rule_that_cannot_be_applied_is_refused_at_once(
    pipeline: Make, llava: Make, tiny_model: Make, encoded_image: Make
) -> None:
    removed = StagePlan(blocks=dict.fromkeys((0, 1), Mode.MLP_AND_KV))
    for rule, says, parts in (
        (VisualTokens(method="psychic", num_keep=3), "not known", {}),
        (VisualTokens(num_keep=0.9, num_aligned=0.1), "fewer", {}),
        (VisualTokens(method="fastv", num_keep=3), "attends in 1", {"prefill": removed}),
    ):
        with pytest.raises(PlanError, match=says):
            pipeline("llava", visual_tokens=rule, **parts)
    text = tiny_model("llama")
    plan = PruningPlan(model=signature_of(text), visual_tokens=VisualTokens(num_keep=3))
    with pytest.raises(PlanError, match="takes no images"):
        LocalPipeline(text, plan=plan)
    own = asking(ONE, [encoded_image(0)], visual_tokens=VisualTokens(method="psychic", num_keep=3))
    with pytest.raises(PlanError, match="not known"):
        pipeline("llava").generate([own], GREEDY)
