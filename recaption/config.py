"""Configuration of the vision-language engines, the pool that runs them, and the stage `captions`."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipelines.core.config import FrozenConfig, ModelRef, execution_field
from pipelines.core.model_prompts import caption_prompt


class VllmEngineConfig(FrozenConfig):
    """A vision-language model run by vLLM in the process that uses it.

    vLLM at temperature 0 is not batch-invariant, so every setting that affects batches or arithmetic (dtype, tensor
    parallelism, sequences per step) is part of a result's fingerprint; memory settings are not.
    """

    kind: Literal["vllm"] = "vllm"
    model: ModelRef
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type; "auto" uses the checkpoint's. Use float32 on a CPU, where bfloat16 is emulated."""
    quantization: str | None = None
    """Name of vLLM's quantisation method; None uses the checkpoint's."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that share one copy of the model; the pool must give each actor that many."""
    max_model_len: int = Field(4096, ge=64)
    """Maximum tokens of image, prompt and answer together; a longer request fails, the others do not."""
    max_num_seqs: int = Field(128, ge=1)
    """Sequences per step: more is faster until the KV cache is full."""
    max_num_batched_tokens: int | None = Field(None, ge=64)
    """Tokens per step; None uses vLLM's default."""
    max_image_px: int | None = Field(None, ge=1)
    """Pixels (width x height) that larger images are scaled down to; None uses the processor's limit."""
    enforce_eager: bool = False
    """Skip CUDA graphs and compilation: slower steps, faster start. Always use it on a CPU."""
    seed: int = 0
    gpu_memory_utilization: float = execution_field(0.9, gt=0.0, le=1.0)
    """Share of a GPU's memory that vLLM may use."""
    kv_cache_memory_bytes: int | None = execution_field(None, ge=1 << 20)
    """KV cache size; None lets vLLM measure what is free, which fails on a laptop-sized CPU."""
    omp_num_threads: int | None = execution_field(None, ge=1)
    """OpenMP threads of the engine's process; None uses vLLM's default. Use 1 on a 2-core machine: two threads contend
    (3.9 against 106 images/s)."""
    offline: bool = execution_field(False)
    """Never contact a model hub: for local and cached models."""


class OpenAIEngineConfig(FrozenConfig):
    """A vision-language model behind an OpenAI-compatible HTTP endpoint, such as a `vllm serve` elsewhere."""

    kind: Literal["openai"] = "openai"
    model: ModelRef
    """`id` is the model name that the endpoint serves; `revision` is the one its operator states."""
    seed: int = 0
    base_url: str = execution_field("http://127.0.0.1:8000/v1", pattern=r"^https?://")
    """Root of the API, including its version: requests go to ``<base_url>/chat/completions``."""
    api_key_variable: str = execution_field("OPENAI_API_KEY")
    """Name of the environment variable that holds the API key; no key is sent if it is unset."""
    max_concurrency: int = execution_field(64, ge=1)
    """Maximum number of concurrent requests."""
    timeout_seconds: float = execution_field(120.0, gt=0)
    """Timeout of one request."""
    max_attempts: int = execution_field(6, ge=1)
    """Attempts per request, with exponential backoff, for timeouts, 429 and 5xx."""
    first_pause_seconds: float = execution_field(1.0, ge=0)
    """Backoff before the second attempt; doubled before each further one, up to 60 s."""


EngineConfig = Annotated[VllmEngineConfig | OpenAIEngineConfig, Field(discriminator="kind")]


class PoolConfig(FrozenConfig):
    """Number and placement of engines. Nothing here affects an answer."""

    ray_address: str = execution_field("local")
    """"local" starts Ray on this machine for the lifetime of the process; "auto" joins the cluster that this process
    runs in; ``host:port`` or ``ray://host:port`` joins that cluster. An HTTP engine needs no Ray and ignores this."""
    min_actors: int = execution_field(1, ge=1)
    """Engines that must be up before work starts."""
    max_actors: int = execution_field(1, ge=1)
    """Engines requested. Those that the cluster has no room for yet join when it grows."""
    num_cpus_per_actor: float = execution_field(1.0, ge=0)
    num_gpus_per_actor: float = execution_field(0.0, ge=0)
    object_store_memory_bytes: int = execution_field(256 << 20, ge=80 << 20)
    """Shared memory of a local Ray, for batches in flight; beyond it Ray spills to disk."""
    max_actor_restarts: int = execution_field(4, ge=0)
    """Restarts of one engine that died (killed, out of memory, node lost) before the stage fails."""
    start_timeout_seconds: float = execution_field(1800.0, gt=0)
    """Timeout for `min_actors` engines to start: a large model takes many minutes to load, a full cluster forever."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.max_actors < self.min_actors:
            raise ValueError(f"max_actors {self.max_actors} is below min_actors {self.min_actors}")
        return self


class CaptionCheckConfig(FrozenConfig):
    """Thresholds of the caption checks. A flag only marks a caption; `shards` drops the empty and truncated ones."""

    min_words: int = Field(default=4, ge=0)
    """A caption with fewer words is flagged ``too_short``."""
    ngram_words: int = Field(default=4, ge=1)
    """Length of the word n-grams that are counted for the flag ``repetition``."""
    max_repeated_share: float = Field(default=0.3, ge=0.0, le=1.0)
    """Share of a caption's n-grams that may repeat an earlier one; above it the flag is ``repetition``."""


class CaptionsConfig(FrozenConfig):
    """Configuration of the stage `captions`: one caption per image."""

    captioner: EngineConfig
    prompt_version: str = "dense-1"
    """A key of `pipelines.core.model_prompts.CAPTION_PROMPTS`."""
    max_caption_tokens: int = Field(512, ge=1)
    """Longer captions are truncated and flagged ``truncated``."""
    rows_per_batch: int = Field(256, ge=1)
    """Images per engine call; a batch never spans two shards, so resuming changes nothing."""
    max_failed_share: float = Field(0.02, ge=0.0, le=1.0)
    """Share of a shard's images that may fail (unreadable, rejected by the engine) before the stage stops."""
    checks: CaptionCheckConfig = CaptionCheckConfig()
    pool: PoolConfig = execution_field(PoolConfig())

    @field_validator("prompt_version")
    @classmethod
    def _check_prompt_version(cls, version: str) -> str:
        caption_prompt(version)
        return version
