"""``rayapp generate``: answers in this process, the reference that the service must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rayapp.commands.options import command
from rayapp.engine.sampling_params import SamplingParams
from rayapp.settings import ModelSettings


@command(max_tokens=64, without=("logprobs", "prompt_logprobs"))
def generate(
    model: ModelSettings,
    sampling: SamplingParams,
    prompt: Annotated[
        list[str], typer.Option(help="Prompt to answer; may be given several times.")
    ],
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Image file that every prompt is about; may be given several times."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Plan directory or plan.json; without it, the dense model."),
    ] = None,
) -> None:
    """Answer prompts in this process: what the service must equal."""
    from rayapp.engine.local import LocalPipeline, with_images
    from rayapp.models.hub import locate
    from rayapp.models.loading import load_model
    from rayapp.plan import PruningPlan
    from rayapp.vision.llava import image_processor_of

    where = locate(model.model, model.revision).directory
    chosen = PruningPlan.load(plan) if plan else PruningPlan()
    loaded = load_model(
        where,
        plan=chosen,
        stage="unified",
        dtype=model.dtype,
        device=model.device,
        packed=True,
    )
    processor = image_processor_of(where, loaded.model.config)
    pipeline = LocalPipeline(loaded.model, loaded.tokenizer, chosen, image_processor=processor)
    prompts = [with_images(text, image, pipeline) for text in prompt] if image else list(prompt)
    for completion in pipeline.generate(prompts, sampling):
        typer.echo(completion.text)
