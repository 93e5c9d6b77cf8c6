"""Configuration of the vision-language engines, of the pool that runs them, and of the caption stage."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipelines.core.config import FrozenConfig, ModelRef, execution_field
from pipelines.core.model_prompts import caption_prompt


class VllmEngineConfig(FrozenConfig):
    """A vision-language model run by vLLM inside the process that uses it.

    vLLM at temperature 0 is not batch-invariant, so everything that shapes a batch or the arithmetic (types, tensor
    parallelism, sequences per step) is part of a result's identity; memory settings are not.
    """

    kind: Literal["vllm"] = "vllm"
    model: ModelRef
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type; "auto" takes the checkpoint's own. float32 on a CPU: bfloat16 is emulated there."""
    quantization: str | None = None
    """Name of vLLM's quantisation method; None takes what the checkpoint says."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs that share one copy of the model; the pool must give each actor as many."""
    max_model_len: int = Field(4096, ge=64)
    """Tokens of image, prompt and answer together; longer requests are refused one by one."""
    max_num_seqs: int = Field(128, ge=1)
    """Sequences per step: more is faster until memory for keys and values runs out."""
    max_num_batched_tokens: int | None = Field(None, ge=64)
    """Tokens per step; None leaves it to vLLM."""
    max_image_px: int | None = Field(None, ge=1)
    """Pixels (width x height) an image is scaled down to before the model sees it; None takes the processor's own."""
    enforce_eager: bool = False
    """Skip CUDA graphs and compilation: slower steps, faster start. Always wanted on a CPU."""
    seed: int = 0
    gpu_memory_utilization: float = execution_field(0.9, gt=0.0, le=1.0)
    """Share of a GPU's memory that vLLM may take."""
    kv_cache_memory_bytes: int | None = execution_field(None, ge=1 << 20)
    """Memory for keys and values; None lets vLLM measure, which a CPU of laptop size fails at."""
    omp_num_threads: int | None = execution_field(None, ge=1)
    """OpenMP threads of the engine's process; None leaves it to vLLM. 1 on a 2-core machine: two threads fight
    (3.9 against 106 images/s)."""
    offline: bool = execution_field(False)
    """Never ask a model hub: for local models and cached ones."""


class OpenAIEngineConfig(FrozenConfig):
    """A vision-language model behind an OpenAI-compatible HTTP endpoint, such as a `vllm serve` elsewhere."""

    kind: Literal["openai"] = "openai"
    model: ModelRef
    """`id` is the model name the endpoint serves; `revision` is what its operator says it is."""
    seed: int = 0
    base_url: str = execution_field("http://127.0.0.1:8000/v1", pattern=r"^https?://")
    """Root of the API, with its version: requests go to ``<base_url>/chat/completions``."""
    api_key_variable: str = execution_field("OPENAI_API_KEY")
    """Name of the environment variable that holds the key; where it is unset, no key is sent."""
    max_concurrency: int = execution_field(64, ge=1)
    """Requests under way at once."""
    timeout_seconds: float = execution_field(120.0, gt=0)
    """Longest wait for one answer."""
    max_attempts: int = execution_field(6, ge=1)
    """Tries per request, with exponential pauses between them, for time-outs, 429 and 5xx."""
    first_pause_seconds: float = execution_field(1.0, ge=0)
    """Pause before the second try; doubled before each further one, at most 60 s."""


EngineConfig = Annotated[VllmEngineConfig | OpenAIEngineConfig, Field(discriminator="kind")]


class PoolConfig(FrozenConfig):
    """How many engines run, and where. Nothing here changes an answer."""

    ray_address: str = execution_field("local")
    """"local" starts Ray on this machine for the life of the process; "auto" joins the cluster this process runs in;
    ``host:port`` or ``ray://host:port`` names one. An HTTP engine needs no Ray and ignores this."""
    min_actors: int = execution_field(1, ge=1)
    """Engines that must be up before work starts."""
    max_actors: int = execution_field(1, ge=1)
    """Engines asked for. Those the cluster has no room for yet join when it grows."""
    num_cpus_per_actor: float = execution_field(1.0, ge=0)
    num_gpus_per_actor: float = execution_field(0.0, ge=0)
    object_store_memory_bytes: int = execution_field(256 << 20, ge=80 << 20)
    """Shared memory of a local Ray, for batches on their way; Ray spills to disk beyond it."""
    max_actor_restarts: int = execution_field(4, ge=0)
    """Times one engine may die (killed, out of memory, node lost) and be started again before the stage gives up."""
    start_timeout_seconds: float = execution_field(1800.0, gt=0)
    """Longest wait for `min_actors` engines: a large model loads for many minutes, a full cluster for ever."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_actors < self.min_actors:
            raise ValueError(f"max_actors {self.max_actors} is below min_actors {self.min_actors}")
        return self


class CaptionCheckConfig(FrozenConfig):
    """Bounds of the caption checks. A flag marks a caption; only empty and truncated ones are dropped, by `shards`."""

    min_words: int = Field(default=4, ge=0)
    """Fewer words than this: flag ``too_short``."""
    ngram_words: int = Field(default=4, ge=1)
    """Length of the word n-grams that are counted for flag ``repetition``."""
    max_repeated_share: float = Field(default=0.3, ge=0.0, le=1.0)
    """Largest share of a caption's n-grams that may be repeats of an earlier one."""


class CaptionsConfig(FrozenConfig):
    """Stage `captions`: one caption for each image."""

    captioner: EngineConfig
    prompt_version: str = "dense-1"
    """A key of `pipelines.core.model_prompts.CAPTION_PROMPTS`."""
    max_caption_tokens: int = Field(512, ge=1)
    """Longer captions are cut and flagged ``truncated``."""
    rows_per_batch: int = Field(256, ge=1)
    """Images given to the engine in one call; a batch never spans two shards, so that resuming changes nothing."""
    max_failed_share: float = Field(0.02, ge=0.0, le=1.0)
    """Share of a shard's images that may get no answer (unreadable, refused by the engine) before the stage stops."""
    checks: CaptionCheckConfig = CaptionCheckConfig()
    pool: PoolConfig = execution_field(PoolConfig())

    @field_validator("prompt_version")
    @classmethod
    def _known_prompt(cls, version: str) -> str:
        caption_prompt(version)
        return version
