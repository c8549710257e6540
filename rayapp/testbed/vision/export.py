"""A trained model as a Hugging Face directory: bf16 weights, processor, configuration."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rayapp.testbed.export import settle
from rayapp.testbed.vision.model import Shape
from rayapp.testbed.vision.questions.words import (
    CHAT_TEMPLATE,
    END_ID,
    IMAGE_TOKEN,
    PAD_ID,
    word_tokenizer,
)
from rayapp.testbed.vision.scenes.scenes import PATCH, SIDE


def plain_model(
    model: LlavaForConditionalGeneration, shape: Shape
) -> LlavaForConditionalGeneration:
    """The trained weights in a model that attends as transformers does by itself, fp32."""
    plain = LlavaForConditionalGeneration(shape.config()).float().eval()
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    return plain


def image_processor() -> CLIPImageProcessorPil:
    """A processor of pictures to pixels from -1 to 1; pictures of another size are resized."""
    side = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size=side,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def processor(max_positions: int) -> LlavaProcessor:
    """The processor of pictures and questions, as LLaVA-1.5 has it."""
    return LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=word_tokenizer(max_positions),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )


def export_model(model: LlavaForConditionalGeneration, shape: Shape, directory: Path | str) -> None:
    """Write the model in bf16 with its processor, for ``from_pretrained``.

    Args:
        model: The model of a run.
        shape: The sizes of the model.
        directory: The directory of the files; made if missing, files of the same names replaced.
    """
    plain = plain_model(model, shape).to(torch.bfloat16)
    plain.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=END_ID, pad_token_id=PAD_ID
    )
    plain.save_pretrained(directory)
    processor(shape.max_positions).save_pretrained(directory)
    word_tokenizer(shape.max_positions).save_pretrained(directory)
    image_processor().save_pretrained(directory)
    settle(Path(directory))
