"""Adapters against the models' own forward: everything kept is exact, pruning equals masking."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel, VipLlavaConfig

from rayapp.errors import ModelError, PlanError, RequestError
from rayapp.models.blocks import find_decoder, signature_of
from rayapp.models.loading import load_model
from rayapp.models.stack import BlockStack
from rayapp.plan import Mode, PruningPlan, StagePlan, VisualTokens
from rayapp.vision.attention import last_token_attention
from rayapp.vision.images import DecodedImage
from rayapp.vision.llava import LlavaAdapter, check_takes_images, load_image_processor
from rayapp.vision.prompt import PromptEmbeddings, num_unpruned
from rayapp.vision.selection import METHODS

KINDS = ("llava", "llava_next")
IMAGE_TOKEN = 290
QUESTION = [11, 12, 13, 14, 15]
PROMPT = [1, 2, IMAGE_TOKEN, 3, *QUESTION, 4]
TWO = [1, IMAGE_TOKEN, 2, IMAGE_TOKEN, *QUESTION, 4]
SHAPES = [(20, 20), (40, 16), (16, 50), (13, 31)]

Make = Callable[..., PreTrainedModel]
Adapt = Callable[[PreTrainedModel], LlavaAdapter]
Picture = Callable[..., DecodedImage]


class PassThrough:
    def update(self, keys: torch.Tensor, values: torch.Tensor, block: int) -> Any:
        return keys, values


def logits_of(adapter: LlavaAdapter, prompt: PromptEmbeddings) -> torch.Tensor:
    with torch.inference_mode():
        hidden = adapter.stack.run(prompt.hidden_TE[None], prompt.positions_T[None], PassThrough())
        return adapter.stack.logits(hidden)[0]


def dense_inputs(
    processor: Any, token_ids: list[int], images: list[DecodedImage], counts: list[int]
) -> dict[str, torch.Tensor]:
    """The arguments of a call of the plain model: repeated placeholders, and pixels."""
    left, ids = iter(counts), []
    for token in token_ids:
        ids += [token] * (next(left) if token == IMAGE_TOKEN else 1)
    pixels = processor(images=[image.pixels for image in images], return_tensors="pt")
    return {"input_ids": torch.tensor([ids]), **pixels}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SHAPES)
def test_keeping_all_gives_the_models_own_input_bit_for_bit(
    kind: str, size: tuple[int, int], llava: Make, adapter: Adapt, processor: Any, picture: Picture
) -> None:
    model, image = llava(kind), picture(0, *size)
    ours = adapter(model)
    encoded = ours.encode(image)
    inputs = dense_inputs(processor(kind), PROMPT, [image], [encoded.num_tokens])
    entering: list[torch.Tensor] = []
    decoder = find_decoder(model)
    handle = decoder.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: entering.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.inference_mode():
        model(**inputs)
    handle.remove()
    dense = ours.embed_prompt(PROMPT, [encoded])
    everything = ours.embed_prompt(PROMPT, [encoded], VisualTokens(num_keep=1.0))
    for prompt in (dense, everything):
        assert torch.equal(prompt.hidden_TE, entering[0][0])
        assert prompt.positions_T.tolist() == list(range(len(inputs["input_ids"][0])))
        assert prompt.num_visual_tokens_removed == 0
        assert prompt.next_position == prompt.num_prompt_tokens == prompt.num_tokens
        assert prompt.num_prompt_tokens == num_unpruned(PROMPT, [encoded.num_tokens])


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_all_generates_what_plain_generate_does(
    kind: str, llava: Make, adapter: Adapt, processor: Any, picture: Picture
) -> None:
    model, image = llava(kind), picture(1, 40, 16)
    ours = adapter(llava(kind))
    encoded = ours.encode(image)
    inputs = dense_inputs(processor(kind), PROMPT, [image], [encoded.num_tokens])
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    prompt = ours.embed_prompt(PROMPT, [encoded])
    answer = model.generate(
        inputs_embeds=prompt.hidden_TE[None],
        attention_mask=torch.ones(1, prompt.num_tokens, dtype=torch.int64),
        **options,
    )
    assert answer[0].tolist() == expected.tolist()
    with torch.inference_mode():
        assert torch.allclose(logits_of(ours, prompt), model(**inputs).logits[0], atol=1e-5)


@pytest.mark.parametrize("text", ["llama", "mistral"])
@pytest.mark.parametrize("kind", KINDS)
def test_original_positions_equal_the_model_with_the_others_masked_out(
    kind: str, text: str, llava: Make, adapter: Adapt, processor: Any, picture: Picture
) -> None:
    model, images = llava(kind, text), [picture(2, 40, 16), picture(3, 20, 20)]
    ours = adapter(llava(kind, text))
    encoded = [ours.encode(image) for image in images]
    rule = VisualTokens(num_keep=7)
    prompt = ours.embed_prompt(TWO, encoded, rule, text_token_ids=QUESTION)
    counts = [e.num_tokens for e in encoded]
    assert 0 < prompt.num_visual_tokens_removed < sum(counts)
    assert prompt.num_prompt_tokens == prompt.next_position == num_unpruned(TWO, counts)
    inputs = dense_inputs(processor(kind), TWO, images, counts)
    total = prompt.num_prompt_tokens
    mask = torch.zeros(1, total, dtype=torch.int64)
    mask[0, prompt.positions_T] = 1
    with torch.inference_mode():
        masked = model(
            **inputs, attention_mask=mask, position_ids=torch.arange(total)[None]
        ).logits[0, prompt.positions_T]
        unmasked = model(**inputs).logits[0, prompt.positions_T]
    assert torch.allclose(logits_of(ours, prompt), masked, atol=2e-5)
    assert not torch.allclose(masked[-1], unmasked[-1], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_compact_positions_equal_the_model_given_the_kept_embeddings(
    kind: str, llava: Make, adapter: Adapt, picture: Picture
) -> None:
    model, ours = llava(kind), adapter(llava(kind))
    encoded = ours.encode(picture(4, 16, 50))
    compact = VisualTokens(num_keep=10, positions="compact")
    prompt = ours.embed_prompt(PROMPT, [encoded], compact, text_token_ids=QUESTION)
    assert prompt.next_position == prompt.num_tokens < prompt.num_prompt_tokens
    with torch.inference_mode():
        expected = model(inputs_embeds=prompt.hidden_TE[None]).logits[0]
    assert torch.allclose(logits_of(ours, prompt), expected, atol=1e-5)
    original = VisualTokens(num_keep=10)
    gapped = ours.embed_prompt(PROMPT, [encoded], original, text_token_ids=QUESTION)
    assert torch.equal(gapped.hidden_TE, prompt.hidden_TE)
    assert not torch.allclose(logits_of(ours, gapped), expected, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_prunes_both_models(
    kind: str, method: str, llava: Make, adapter: Adapt, picture: Picture
) -> None:
    ours = adapter(llava(kind))
    encoded = [
        ours.encode(picture(seed, 40, 16), cls_attention=method == "cls_attention")
        for seed in (5, 6)
    ]
    rule = VisualTokens(method=method, num_keep=9)
    prompt = ours.embed_prompt(TWO, encoded, rule, text_token_ids=QUESTION)
    for (start, stop), image in zip(prompt.image_spans, encoded, strict=True):
        newlines = sum(pool.rows for pool in image.layout.pools if pool.has_newlines)
        assert 9 <= stop - start <= 9 + newlines
    assert prompt.num_tokens == num_unpruned(TWO, [b - a for a, b in prompt.image_spans])
    assert prompt.positions_T.diff().min() >= 1
    answer = logits_of(ours, prompt)
    assert answer.isfinite().all()


def test_next_layout_is_the_base_view_then_the_unpadded_grid(
    llava: Make, adapter: Adapt, picture: Picture
) -> None:
    model = llava("llava_next")
    encoded = adapter(model).encode(picture(7, 40, 16))  # best fit: 16 x 32, fully used in breadth
    base, grid = encoded.layout.pools
    assert (base.rows, base.columns, base.has_newlines) == (4, 4, False)
    assert (grid.rows, grid.columns, grid.has_newlines) == (4, 8, True)
    newline = model.model.image_newline
    places = [grid.start + row * 9 + 8 for row in range(4)]
    assert torch.equal(encoded.features_ND[places], newline.expand(4, -1))
    others = [i for i in range(encoded.num_tokens) if i not in places]
    assert (encoded.features_ND[others] == newline).all(dim=1).sum() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SHAPES)
def test_cls_attention_is_that_of_the_eager_tower(
    kind: str, size: tuple[int, int], llava: Make, adapter: Adapt, processor: Any, picture: Picture
) -> None:
    model, image = llava(kind), picture(8, *size)
    encoded = adapter(model).encode(image, cls_attention=True)
    assert torch.equal(encoded.features_ND, adapter(llava(kind)).encode(image).features_ND)
    eager = llava(kind).model.vision_tower
    eager.set_attn_implementation("eager")
    pixels = processor(kind)(images=[image.pixels], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        views = pixels if kind == "llava" else pixels[0]
        weights = eager(views, output_attentions=True).attentions[-2]
    expected = weights[:, :, 0, 1:].mean(dim=1)
    scores = encoded.cls_attention_N
    base = encoded.layout.pools[0].tokens(scores)
    assert torch.allclose(base, expected[0], atol=1e-6)
    if kind == "llava_next":
        grid = encoded.layout.pools[1]
        assert (scores.nonzero()[:, 0].numel()) == encoded.layout.num_visual  # newlines: zero
        found = set(grid.tokens(scores).round(decimals=5).tolist())
        assert found <= set(expected[1:].flatten().round(decimals=5).tolist())


def test_merged_tiles_lie_as_the_models_own_packing_lays_them(
    llava: Make, adapter: Adapt, picture: Picture
) -> None:
    """Scores and features of one token stay at one place, whatever the image's shape."""
    model = llava("llava_next")
    ours = adapter(model)
    for width, height in SHAPES:
        encoded = ours.encode(picture(9, width, height))
        num_views = 1 + {(40, 16): 2, (16, 50): 3, (20, 20): 4, (13, 31): 2}[width, height]
        marks = torch.arange(num_views * 16, dtype=torch.float32).view(num_views, 16) + 1
        packed, _ = model.pack_image_features(
            [marks[..., None].expand(-1, -1, 32)],
            torch.tensor([[height, width]]),
            vision_feature_select_strategy="default",
            image_newline=torch.zeros(32),
        )
        laid_out = ours._in_prompt_order(marks, [height, width])
        assert torch.equal(laid_out, packed[0][:, 0])
        assert laid_out.shape == (encoded.num_tokens,)


@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_fastv_scores_are_the_eager_attention_of_the_last_token(
    text: str, llava: Make, adapter: Adapt, picture: Picture
) -> None:
    ours = adapter(llava("llava", text))
    prompt = ours.embed_prompt(PROMPT, [ours.encode(picture(10))])
    scores = last_token_attention(ours.stack, prompt.hidden_TE, block=2)
    eager = llava("llava", text)
    eager.set_attn_implementation("eager")
    with torch.inference_mode():
        rows = eager(inputs_embeds=prompt.hidden_TE[None], output_attentions=True).attentions[1]
    assert torch.allclose(scores, rows[0, :, -1].mean(dim=0), atol=1e-5)
    assert float(scores.sum()) == pytest.approx(1.0, abs=1e-5)


def test_fastv_counts_the_blocks_that_attend(llava: Make, picture: Picture, processor: Any) -> None:
    model = llava("llava")
    dense = LlavaAdapter(model, BlockStack(model, PruningPlan(), "prefill"), processor("llava"))
    hidden = dense.embed_prompt(PROMPT, [dense.encode(picture(11))]).hidden_TE
    signature = signature_of(model)
    modes = {0: Mode.REMOVED}
    plan = PruningPlan(
        model=signature, prefill=StagePlan(blocks=modes), decode=StagePlan(blocks=modes)
    )
    stack = BlockStack(model, plan, "prefill")
    assert last_token_attention(stack, hidden, block=2).shape == (hidden.shape[0],)
    with pytest.raises(PlanError, match="2 blocks only"):
        last_token_attention(stack, hidden, block=3)


def test_an_image_does_not_depend_on_its_neighbours_nor_on_other_stages(
    llava: Make, adapter: Adapt, picture: Picture
) -> None:
    """Stages share modules; recording hidden states in one must not disturb another."""
    model = llava("llava_next")
    alone = adapter(llava("llava_next")).encode(picture(12)).features_ND
    first, second = adapter(model), adapter(model)
    BlockStack(model, PruningPlan(), "decode")
    for ours in (first, second, first):
        ours.encode(picture(13), cls_attention=True)
        assert torch.equal(ours.encode(picture(12)).features_ND, alone)


def test_text_is_embedded_without_placeholders(llava: Make, adapter: Adapt) -> None:
    model = llava("llava")
    ours = adapter(model)
    table = model.get_input_embeddings().weight
    found = ours.text_embeddings([5, IMAGE_TOKEN, 6])
    assert torch.equal(found, table[[5, 6]])
    assert ours.text_embeddings([]).shape == (0, 32)


@pytest.mark.parametrize(("token_ids", "num_images"), [(PROMPT, 0), (PROMPT, 2), ([1, 2], 1)])
def test_images_and_placeholders_must_match(
    token_ids: list[int], num_images: int, llava: Make, adapter: Adapt, picture: Picture
) -> None:
    ours = adapter(llava("llava"))
    images = [ours.encode(picture(14))] * num_images
    with pytest.raises(RequestError, match="one image per placeholder"):
        ours.embed_prompt(token_ids, images)


def test_a_prompt_without_images_is_text(llava: Make, adapter: Adapt) -> None:
    model = llava("llava")
    prompt = adapter(model).embed_prompt([1, 2, 3], [], VisualTokens(num_keep=4))
    assert torch.equal(prompt.hidden_TE, model.get_input_embeddings().weight[[1, 2, 3]])
    assert prompt.next_position == 3


def test_other_models_are_refused_by_name(
    llava: Make, tiny_model: Callable[..., PreTrainedModel], processor: Any
) -> None:
    with pytest.raises(ModelError, match="'vipllava' takes no images here"):
        check_takes_images(VipLlavaConfig())
    text = tiny_model("llama")
    with pytest.raises(ModelError, match="'llama' takes no images here"):
        LlavaAdapter(text, BlockStack(text, PruningPlan(), "prefill"), processor("llava"))
    with pytest.raises(ModelError, match="'llama'"):
        check_takes_images(LlamaConfig())
    full = llava("llava_next").config
    full.vision_feature_select_strategy = "full"
    with pytest.raises(ModelError, match="'full'"):
        check_takes_images(full)


def test_a_tower_whose_tokens_are_no_grid_is_refused(
    llava: Make, adapter: Adapt, picture: Picture
) -> None:
    model = llava("llava")
    model.config.vision_feature_select_strategy = "full"  # 16 patches and the CLS token
    with pytest.raises(ModelError, match="17 visual tokens"):
        adapter(model).encode(picture(15))


def test_prefill_loads_the_tower_and_decode_does_not(
    tmp_path: Path,
    llava: Make,
    adapter: Adapt,
    processor: Any,
    picture: Picture,
    byte_tokenizer: Any,
) -> None:
    model, image = llava("llava_next"), picture(16)
    for part in (model, processor("llava_next"), byte_tokenizer):
        part.save_pretrained(tmp_path)
    first = adapter(model).encode(image)
    loaded = load_model(tmp_path, stage="prefill")
    stack = BlockStack(loaded.model, PruningPlan(), "prefill")
    again = LlavaAdapter(loaded.model, stack, load_image_processor(tmp_path)).encode(image)
    assert torch.equal(again.features_ND, first.features_ND)
    decode = load_model(tmp_path, stage="decode")
    stack = BlockStack(decode.model, PruningPlan(), "decode")
    with pytest.raises(ModelError, match="tower was not loaded"):
        LlavaAdapter(decode.model, stack, processor("llava_next"))


def test_a_directory_without_an_image_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no usable image processor"):
        load_image_processor(tmp_path)
