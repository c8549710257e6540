"""What every replica is: its identity, and its stage of the model."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from ray import serve

from rayapp.api.service import Pool, ReplicaHealth
from rayapp.distributed.serve.messages import Place, Versions
from rayapp.distributed.serve.settings import ServiceSettings
from rayapp.models.architecture import text_config
from rayapp.models.hub import locate
from rayapp.models.loading import LoadedModel, load_model
from rayapp.plan import PruningPlan
from rayapp.vision.llava import image_processor_of
from rayapp.vision.reader import ImageSupport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageModel:
    """One stage's weights on a replica, with the plan and the limits to run them under.

    ``images`` is set if this replica prefills a model that takes images; ``load_s`` is the time in
    seconds that loading took.
    """

    loaded: LoadedModel
    plan: PruningPlan
    max_model_len: int
    images: ImageSupport | None = None
    load_s: float = 0.0

    @property
    def versions(self) -> Versions:
        """Plan, weights and type of this replica, which requests must want."""
        return Versions.of(self.plan, self.loaded.signature, self.loaded.model.dtype)

    def health(self, pool: Pool, place: Place, **numbers: Any) -> ReplicaHealth:
        """Describe a replica of this stage.

        Args:
            pool: The pool that the replica serves in.
            place: The replica and its node.
            numbers: The other fields of :class:`ReplicaHealth`, from the engine.
        """
        return ReplicaHealth(
            pool=pool,
            replica_id=place.replica_id,
            node=place.node,
            parameter_bytes=self.loaded.parameter_bytes,
            plan_fingerprint=self.versions.plan_fingerprint,
            weights_fingerprint=self.versions.weights_fingerprint,
            dtype=self.versions.dtype,
            **numbers,
        )


def load_stage(
    settings: ServiceSettings,
    stage: Literal["prefill", "decode", "unified"],
    *,
    runs_both: bool = False,
) -> StageModel:
    """Read the tensors that ``stage`` runs; a replica computes with as many threads as CPUs.

    Args:
        settings: The settings of the service.
        stage: The pool of the replica.
        runs_both: True for a replica that runs both stages, whatever its pool is.
    """
    began_s = time.monotonic()
    torch.set_num_threads(settings.pools[stage].threads)
    plan = PruningPlan.load(settings.plan) if settings.plan else PruningPlan()
    device = settings.pools[stage].device
    path = locate(settings.model, settings.revision).directory
    loaded = load_model(
        path,
        plan=plan,
        stage="unified" if runs_both else stage,
        dtype=settings.dtype,
        device=device,
        packed=True,
    )
    limit = settings.max_model_len or text_config(loaded.model.config).max_position_embeddings
    logger.info("%s: %d parameter bytes of %s", stage, loaded.parameter_bytes, settings.model)
    images = None if stage == "decode" else image_support(settings, path, loaded.model.config)
    return StageModel(loaded, plan, limit, images, load_s=time.monotonic() - began_s)


def image_support(settings: ServiceSettings, path: Path, config: Any) -> ImageSupport | None:
    """Load the image processor for prefill, with its limits; None for a text-only model.

    Raises:
        ModelError: The model takes images and has no usable image processor.
    """
    processor = image_processor_of(path, config)
    if processor is None:
        return None
    return ImageSupport(processor, settings.images, settings.image_cache_bytes)


def this_place() -> Place:
    """Return the replica and the node of this process."""
    context = ray.get_runtime_context()
    return Place(serve.get_replica_context().replica_id.unique_id, context.get_node_id())
