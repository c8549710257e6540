"""Settings of a service: one strict model, from the command line to every replica.

A Serve configuration file carries it as the application's ``args``; unknown keys are refused by
path here, because Serve's own schema lets them pass.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from rayapp.api.keys import digest_of
from rayapp.engine.sequences.memory import BLOCK_SIZE
from rayapp.errors import InputError
from rayapp.scaling.settings import ScalingSettings
from rayapp.settings import (
    DTypeName,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    Mode,
    ModelName,
    Revision,
    Settings,
    Strict,
)
from rayapp.vision.limits import IMAGE_CACHE_BYTES, ImageLimits

APP_NAME = "rayapp"
INGRESS, PREFILL, DECODE, UNIFIED = "ingress", "prefill", "decode", "unified"


MAX_NUM_SEQS = 8
MAX_NUM_BATCHED_TOKENS = 512


class SizeSettings(Settings):
    """What decides the memory of a replica, beside the model and the plan."""

    model_config = ConfigDict(title="What replicas are to hold")

    memory: ByteSize | None = Field(
        default=None,
        ge=1,
        description="Memory that each replica has on its device, such as 16GiB; what is free here "
        "without.",
        json_schema_extra={"as_text": True},
    )
    device: Literal["cpu", "cuda"] = Field(
        default="cpu", description="Kind of device that replicas compute on."
    )
    mode: Mode = "disaggregated"
    dtype: DTypeName = "auto"
    max_model_len: MaxModelLen = None
    max_num_seqs: MaxNumSeqs = MAX_NUM_SEQS
    max_num_batched_tokens: MaxNumBatchedTokens = MAX_NUM_BATCHED_TOKENS


class ReplicaRange(Strict):
    """Bounds on a pool's number of replicas: at least ``minimum``, at most ``maximum``."""

    minimum: int = Field(default=1, ge=1)
    maximum: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _is_ordered(self) -> ReplicaRange:
        if self.maximum < self.minimum:
            raise ValueError(f"{self} has its maximum below its minimum; write MIN or MIN:MAX")
        return self

    @property
    def is_elastic(self) -> bool:
        """True if the pool scales by itself."""
        return self.maximum > self.minimum

    def __str__(self) -> str:
        return f"{self.minimum}:{self.maximum}"


def _range(value: Any) -> Any:
    """Parse a range from ``2``, ``"2"`` or ``"1:3"``."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return value
    low, _, high = str(value).partition(":")
    try:
        return {"minimum": int(low), "maximum": int(high or low)}
    except ValueError:
        raise ValueError(f"{value!r} is no number of replicas; write MIN or MIN:MAX") from None


Replicas = Annotated[ReplicaRange, BeforeValidator(_range), PlainSerializer(str)]


class PoolSettings(Strict):
    """Settings of one pool of replicas: their number, their nodes and their resources.

    A replica starts only on nodes that carry all ``labels`` and have ``num_cpus`` and ``num_gpus``
    free. It computes with a thread per whole CPU; tokens are exact to the bit on one thread only.
    """

    replicas: Replicas = ReplicaRange()
    labels: dict[str, str] = Field(default_factory=dict)
    num_cpus: float = Field(default=1.0, ge=0.0)
    num_gpus: float = Field(default=0.0, ge=0.0)
    device: str = "cpu"

    @model_validator(mode="before")
    @classmethod
    def _on_its_gpus(cls, values: Any) -> Any:
        """A pool that reserves GPUs computes on them unless it says otherwise."""
        if isinstance(values, dict) and values.get("num_gpus") and "device" not in values:
            return {**values, "device": "cuda"}
        return values

    @model_validator(mode="after")
    def _uses_what_it_reserves(self) -> PoolSettings:
        if bool(self.num_gpus) != self.device.startswith("cuda"):
            raise ValueError(
                f"device {self.device!r} with num_gpus {self.num_gpus:g}: replicas on a GPU "
                "reserve GPUs, and others none; correct one of the two"
            )
        return self

    @property
    def threads(self) -> int:
        """Number of threads that a replica computes with."""
        return max(1, int(self.num_cpus))


KV_PART_MS = 20.0
"""Milliseconds that one part of a prompt's KV costs (project default): its calls, and what they
take from a prefill that runs beside them."""


class Deadlines(Strict):
    """Seconds that each phase of a request may last; after them it is freed and answered with 504.

    ``lease_s`` is the time that decode keeps a slot for an admitted request whose tokens nobody
    reads. A replica with an engine that computes one step for longer than ``step_s`` is replaced.
    ``drain_s`` is the time that answers under way have to end once the service is interrupted.
    """

    queue_s: float = Field(default=120.0, gt=0.0)
    prefill_s: float = Field(default=120.0, gt=0.0)
    transfer_s: float = Field(default=120.0, gt=0.0)
    decode_s: float = Field(default=1200.0, gt=0.0)
    lease_s: float = Field(default=15.0, gt=0.0)
    step_s: float = Field(default=120.0, gt=0.0)
    drain_s: float = Field(default=30.0, ge=0.0)

    @property
    def longest_s(self) -> float:
        """Seconds that one attempt at an answer may take in all."""
        return 2 * self.queue_s + self.prefill_s + self.transfer_s + self.decode_s


class ServiceSettings(Strict):
    """The settings of ``rayapp serve``; model and plan are read on every node."""

    model_config = ConfigDict(title="What is served")

    model: ModelName
    revision: Revision = None
    plan: str | None = Field(
        default=None, description="Plan directory or plan.json; without it, the dense model."
    )
    served_model_name: str | None = Field(
        default=None,
        min_length=1,
        description="Name that requests give as model; the last part of --model without it.",
    )
    mode: Mode = "disaggregated"
    dtype: DTypeName = "auto"
    max_model_len: MaxModelLen = None
    max_num_seqs: MaxNumSeqs = MAX_NUM_SEQS
    kv_memory: ByteSize | None = Field(
        default=None,
        ge=1,
        description="Most memory of each decode replica for KV, such as 2GiB; without it, a share "
        "of what is free, and never more than its sequences can fill.",
        json_schema_extra={"as_text": True},
    )
    block_size: int = Field(
        default=BLOCK_SIZE, ge=1, description="Tokens of one page of KV in a decode replica."
    )
    max_num_batched_tokens: MaxNumBatchedTokens = MAX_NUM_BATCHED_TOKENS
    max_waiting: int = Field(
        default=256,
        ge=1,
        description="Requests that may wait for a place at one ingress replica; further ones are "
        "answered with 429.",
    )
    max_attempts: int = Field(
        default=3,
        ge=1,
        description="Times that a prompt is prefilled after losses before its request fails.",
    )
    max_kv_bytes: int = Field(
        default=2 << 30,
        ge=1,
        description="Most bytes of KV that one ingress replica has under way.",
    )
    max_node_kv_bytes: ByteSize | None = Field(
        default=None,
        ge=1,
        description="Most KV that all prefill replicas of one node have under way together, such "
        "as 2GiB, whichever ingress asks; a larger prompt goes alone. Without it, no limit.",
        json_schema_extra={"as_text": True},
    )
    ledger_dir: str | None = Field(
        default=None,
        description="Directory to which every ingress replica writes its KV transfers as Parquet.",
    )
    kv_part_ms: float = Field(
        default=KV_PART_MS,
        ge=0.0,
        description="Milliseconds that a part of a prompt's KV costs, which decides what size of "
        "parts leaves while the rest is computed; 0 sends all that is finished.",
    )
    short_prompt_tokens: int = Field(
        default=0,
        ge=0,
        description="Longest prompt that decode replicas may prefill themselves, where that is "
        "sooner and takes no weights that they lack; 0 has all prompts prefilled apart.",
    )
    images: ImageLimits = ImageLimits()
    image_cache_bytes: int = Field(
        default=IMAGE_CACHE_BYTES,
        ge=0,
        description="Most bytes of encoded images that one prefill replica keeps.",
    )
    ingress: PoolSettings = PoolSettings()
    prefill: PoolSettings = PoolSettings(labels={"role": "prefill"})
    decode: PoolSettings = PoolSettings(labels={"role": "decode"})
    unified: PoolSettings = PoolSettings()
    deadlines: Deadlines = Deadlines()
    scaling: ScalingSettings = ScalingSettings()
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=1, le=65535, description="Port to listen on.")
    api_key: str | None = Field(
        default=None,
        min_length=1,
        description="Key that callers must send; without it, whoever can connect is served.",
        json_schema_extra={"envvar": "RAYAPP_API_KEY"},
    )
    # This is for configuration files, which have no secrets: only a key's digest is ever deployed.
    api_key_digest: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of the key in hex, where the key itself must not be written.",
    )
    allow_unauthenticated: bool = Field(
        default=False,
        description="Let strangers beyond this machine use the service without a key.",
    )

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
    def max_admitted(self) -> int:
        """Most requests that all ingress replicas admit together, those that decode included.

        Whatever replica they reach must have a place for them: what is admitted is not refused.
        """
        decoding = max(pool.replicas.maximum for pool in self.pools.values()) * self.max_num_seqs
        return self.ingress.replicas.maximum * self.max_waiting + decoding

    @property
    def key_digest(self) -> str | None:
        """Digest of the key that callers must send; None if no key is required."""
        return digest_of(self.api_key) if self.api_key else self.api_key_digest

    @property
    def url(self) -> str:
        """The URL at which the service answers."""
        return f"http://{self.host}:{self.port}"

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> ServiceSettings:
        """Parse plain data; an :class:`InputError` names the path of every broken rule."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            reasons = [
                f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}"
                for e in error.errors()
            ]
            raise InputError("service settings: " + "; ".join(reasons)) from None
