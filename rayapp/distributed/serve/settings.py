"""What to serve and how: one strict model, from the command line to every replica.

A Serve configuration file carries it as the application's ``args``; unknown keys are refused by
path here, because Serve's own schema lets them pass.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from rayapp.api.access import digest_of
from rayapp.errors import InputError
from rayapp.vision.images import ImageLimits
from rayapp.vision.reader import CACHE_BYTES

APP_NAME = "rayapp"
DType = Literal["auto", "float32", "bfloat16", "float16"]
INGRESS, PREFILL, DECODE, UNIFIED = "ingress", "prefill", "decode", "unified"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReplicaRange(_Strict):
    """How many replicas a pool has: at least ``minimum``, at most ``maximum``."""

    minimum: int = Field(default=1, ge=1)
    maximum: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _is_ordered(self) -> ReplicaRange:
        if self.maximum < self.minimum:
            raise ValueError(f"{self} has its maximum below its minimum; write MIN or MIN:MAX")
        return self

    @property
    def is_elastic(self) -> bool:
        """Whether the pool scales by itself."""
        return self.maximum > self.minimum

    def __str__(self) -> str:
        return f"{self.minimum}:{self.maximum}"


def _range(value: Any) -> Any:
    """``2``, ``"2"`` and ``"1:3"`` as a range."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return value
    low, _, high = str(value).partition(":")
    try:
        return {"minimum": int(low), "maximum": int(high or low)}
    except ValueError:
        raise ValueError(f"{value!r} is no number of replicas; write MIN or MIN:MAX") from None


Replicas = Annotated[ReplicaRange, BeforeValidator(_range), PlainSerializer(str)]


class PoolSettings(_Strict):
    """One pool of replicas: how many, where, and on what.

    ``labels`` place, resources limit capacity: a replica starts only on nodes that carry all labels
    and have ``num_cpus`` and ``num_gpus`` free.
    """

    replicas: Replicas = ReplicaRange()
    labels: dict[str, str] = {}
    num_cpus: float = Field(default=1.0, ge=0.0)
    num_gpus: float = Field(default=0.0, ge=0.0)
    device: str = "cpu"


class Deadlines(_Strict):
    """Seconds that each phase of a request may last; after them it is freed and answered with 504.

    ``lease_s``: how long decode keeps a slot for an admitted request whose tokens nobody reads.
    """

    queue_s: float = Field(default=120.0, gt=0.0)
    prefill_s: float = Field(default=120.0, gt=0.0)
    transfer_s: float = Field(default=120.0, gt=0.0)
    decode_s: float = Field(default=1200.0, gt=0.0)
    lease_s: float = Field(default=15.0, gt=0.0)


class ScalingSettings(_Strict):
    """When pools with MIN:MAX replicas grow and shrink.

    Args:
        queued_tokens_per_replica: Prompt tokens in the queue that one prefill replica is good for.
        target_usage: Share of its slots that a decode replica is good for.
        upscale_delay_s: How long a pool must look too small before it grows.
        downscale_delay_s: How long it must look too large before it shrinks.
        look_back_s: Over which the metrics are averaged.
        interval_s: How often they are looked at.
    """

    queued_tokens_per_replica: int = Field(default=4096, ge=1)
    target_usage: float = Field(default=0.8, gt=0.0, le=1.0)
    upscale_delay_s: float = Field(default=10.0, ge=0.0)
    downscale_delay_s: float = Field(default=120.0, ge=0.0)
    look_back_s: float = Field(default=10.0, gt=0.0)
    interval_s: float = Field(default=2.0, gt=0.0)


class ServiceSettings(_Strict):
    """Everything that ``rayapp serve`` needs to know.

    Args:
        model: Model directory, readable on every node that runs a replica.
        plan: Plan directory or ``plan.json``; None is the dense model.
        served_model_name: The name that requests give as ``model``; None is the directory's name.
        mode: Stages on replicas of their own, or both in each.
        dtype: Element type of weights and KV; ``auto`` keeps the checkpoint's.
        max_model_len: Most tokens of prompt and answer; None is the model's own limit.
        max_num_seqs: Sequences that one decode replica runs at once.
        max_waiting: Requests of one ingress without a decode slot; more are answered with 429.
        max_attempts: How often a request is prefilled again after losses before it fails.
        max_kv_bytes: Most bytes of KV under way per ingress replica.
        images: What one request may send of images, where the model takes them.
        image_cache_bytes: Most bytes of encoded images that a prefill replica keeps.
        ingress: The replicas that speak HTTP.
        prefill: The prefill pool.
        decode: The decode pool.
        unified: The pool of ``mode: unified``.
        deadlines: Per phase.
        scaling: For pools with MIN:MAX replicas.
        host: Where to listen.
        port: Where to listen.
        api_key: Without it, everybody who can connect is served. Only its digest is deployed.
        api_key_digest: SHA-256 of the key in hex, for configuration files that hold no secret.
    """

    model: str = Field(min_length=1)
    plan: str | None = None
    served_model_name: str | None = Field(default=None, min_length=1)
    mode: Literal["disaggregated", "unified"] = "disaggregated"
    dtype: DType = "auto"
    max_model_len: int | None = Field(default=None, ge=1)
    max_num_seqs: int = Field(default=8, ge=1)
    max_waiting: int = Field(default=256, ge=1)
    max_attempts: int = Field(default=3, ge=1)
    max_kv_bytes: int = Field(default=2 << 30, ge=1)
    images: ImageLimits = ImageLimits()
    image_cache_bytes: int = Field(default=CACHE_BYTES, ge=0)
    ingress: PoolSettings = PoolSettings()
    prefill: PoolSettings = PoolSettings(labels={"role": "prefill"})
    decode: PoolSettings = PoolSettings(labels={"role": "decode"})
    unified: PoolSettings = PoolSettings()
    deadlines: Deadlines = Deadlines()
    scaling: ScalingSettings = ScalingSettings()
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    api_key: str | None = Field(default=None, min_length=1)
    api_key_digest: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")

    @property
    def model_name(self) -> str:
        """The name under which the model is served."""
        return self.served_model_name or self.model.rstrip("/").rpartition("/")[2]

    @property
    def pools(self) -> dict[str, PoolSettings]:
        """The pools of this mode that run the model, by name."""
        if self.mode == "unified":
            return {UNIFIED: self.unified}
        return {PREFILL: self.prefill, DECODE: self.decode}

    @property
    def key_digest(self) -> str | None:
        """Digest of the key that callers must send; None where none is asked for."""
        return digest_of(self.api_key) if self.api_key else self.api_key_digest

    @property
    def url(self) -> str:
        """Where the service answers."""
        return f"http://{self.host}:{self.port}"

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> ServiceSettings:
        """Settings from plain data; :class:`InputError` names the path of every broken rule."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            reasons = [
                f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}"
                for e in error.errors()
            ]
            raise InputError("service settings: " + "; ".join(reasons)) from None
