"""Configuration of the evaluation stages."""

import re
from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from pipelines.core.config import FrozenConfig, ModelRef, added_field, execution_field
from pipelines.core.errors import ThroughlineError
from pipelines.laion.config import EntryList
from recaption.config import EngineConfig, PoolConfig
from training.config import SamplerConfig

Benchmark = Literal["geneval", "genai_bench", "drawbench"]
BENCHMARKS: tuple[Benchmark, ...] = get_args(Benchmark)


def _images_per_prompt() -> dict[Benchmark, int]:
    return {"geneval": 4, "genai_bench": 1, "drawbench": 1}


def _num_grid_prompts() -> dict[Benchmark, int]:
    return {"geneval": 4, "genai_bench": 5, "drawbench": 3}


def parse_partition(partition: str | None) -> tuple[str, Benchmark]:
    """Return arm and benchmark of a partition key such as ``time_wise+shift|geneval``.

    Raises ThroughlineError for a malformed key.
    """
    arm, _, benchmark = (partition or "").partition("|")
    if not re.fullmatch(r"[a-z_]+(\+[a-z_]+)*", arm) or benchmark not in BENCHMARKS:
        raise ThroughlineError(
            f"partition {partition!r}: expected '<arm>|<benchmark>' with a benchmark of {', '.join(BENCHMARKS)}"
        )
    return arm, benchmark


class PromptFile(FrozenConfig):
    """A benchmark's prompt file, pinned by content."""

    path: str = execution_field(min_length=1)
    """Path of the file on this machine."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    num_prompts: int | None = Field(None, ge=1)
    """Expected number of prompts; None accepts any."""


class PromptSetsConfig(FrozenConfig):
    """The benchmarks to evaluate on; a benchmark without a file is skipped."""

    geneval: PromptFile | None = None
    """``evaluation_metadata.jsonl``."""
    genai_image: PromptFile | None = None
    """``genai_image.json``: the prompts of GenAI-Bench."""
    genai_skills: PromptFile | None = None
    """``genai_skills.json``: the skills of those prompts."""
    drawbench: PromptFile | None = None
    """``DrawBench.csv``."""
    limits: dict[Benchmark, int] = Field(default_factory=dict)
    """Maximum number of prompts per benchmark, spread over its skills; without a limit all prompts are used."""

    @model_validator(mode="after")
    def _check(self) -> "PromptSetsConfig":
        if (self.genai_image is None) != (self.genai_skills is None):
            raise ValueError("GenAI-Bench needs both genai_image and genai_skills")
        if not self.benchmarks:
            raise ValueError("no benchmark has a prompt file; name at least one")
        for benchmark, limit in self.limits.items():
            if limit < 1:
                raise ValueError(f"limits.{benchmark} is {limit}; to skip a benchmark, give it no file")
        return self

    @property
    def benchmarks(self) -> tuple[Benchmark, ...]:
        """The benchmarks that have a prompt file, in reporting order."""
        files = {"geneval": self.geneval, "genai_bench": self.genai_image, "drawbench": self.drawbench}
        return tuple(name for name in BENCHMARKS if files[name] is not None)

    def limit(self, benchmark: Benchmark) -> int | None:
        return self.limits.get(benchmark)


class SamplesConfig(FrozenConfig):
    """Configuration of the stage `samples`: image generation for one arm and benchmark."""

    text_encoder: ModelRef
    """The frozen encoder that the model was trained with."""
    autoencoder: ModelRef
    """The autoencoder that made the training latents."""
    sampler: SamplerConfig
    """Steps, guidance and schedule; the arm's own options (Eq. 11) follow from its name."""
    seed: int = Field(0, ge=0)
    """The noise of an image depends only on (seed, prompt, sample index), so all arms start from the same noise."""
    images_per_prompt: dict[Benchmark, int] = Field(default_factory=_images_per_prompt)
    """The published protocols use 4 for GenEval and 1 for the others."""
    prompts_per_unit: int = Field(16, ge=1)
    """Prompts sampled together: more use the device better, but a killed run loses up to this many prompts."""
    device: Literal["cpu", "cuda"] = execution_field("cpu")
    threads: int | None = execution_field(None, ge=1)
    """CPU threads; None uses torch's default. Pixels are bit-exact for equal thread counts."""
    prompt_memory_bytes: int = execution_field(2 << 30, ge=0)
    """Memory for encoded prompts, reused by later arms in the same process; about 6 MB per prompt at paper scale."""

    @model_validator(mode="after")
    def _check(self) -> "SamplesConfig":
        for benchmark in BENCHMARKS:
            if self.images_per_prompt.get(benchmark, 0) < 1:
                raise ValueError(f"images_per_prompt.{benchmark} must be 1 or more")
        return self


class ScoresConfig(FrozenConfig):
    """Configuration of the stage `scores`: the judge model and its questions."""

    judge: EngineConfig
    """The model that answers Yes/No questions and gives ratings; every score is reported with its name."""
    pool: PoolConfig = execution_field(PoolConfig())
    images_per_unit: int = Field(64, ge=1)
    """Images judged together. Their questions form the engine's batches, so this is part of the fingerprint."""
    max_rating_tokens: int = Field(128, ge=16)
    """Maximum tokens of a rating; a longer one is truncated, and the ratings it lacks are counted as unscored."""
    max_unscored_share: float = Field(0.5, ge=0.0, le=1.0)
    """Share of scores that may be missing before the stage stops: the judge is then unable to do the task."""


class JudgeCalibrationConfig(FrozenConfig):
    """Configuration of the stage `judge_calibration`: training images with their own and with another's caption."""

    judge: EngineConfig
    pool: PoolConfig = execution_field(PoolConfig())
    num_images: int = Field(128, ge=2)
    """Number of images; the judge gets two questions about each."""
    images_per_unit: int = Field(64, ge=1)
    withdrawn: EntryList | None = added_field(None)
    """Sample keys of withdrawn rows, which are not used; profiles set the data set's list."""


class FusionAnalysisConfig(FrozenConfig):
    """Configuration of the stage `fusion_analysis`."""

    num_times: int = Field(21, ge=2)
    """Flow times from t = 0 (noise) to t = 1 (data), evenly spaced, both ends included; the paper plots 21."""


class TrajectorySettings(FrozenConfig):
    """Settings of the comparison between the time estimated from the latents and the schedule's time."""

    guidance_scales: tuple[float, ...] = Field((1.0, 3.0, 6.0), min_length=1)
    """Guidance scales to sample with; 1 is the model without guidance."""
    num_samples: int = Field(24, ge=1)
    """Held-out samples that are noised, and for whose captions an image is sampled at each guidance scale."""
    seed: int = Field(0, ge=0)
    """Seed of the noise that sampling starts from."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.guidance_scales)) < len(self.guidance_scales) or min(self.guidance_scales) < 0:
            raise ValueError(f"guidance_scales {self.guidance_scales}: expected different scales, none below 0")
        return self


class TrajectoryAnalysisConfig(TrajectorySettings):
    """Configuration of the stage `trajectory_analysis`."""

    text_encoder: ModelRef
    """The frozen encoder that the model was trained with."""
    sampler: SamplerConfig
    """Steps, schedule and images per batch; its guidance scale is ignored."""
    device: Literal["cpu", "cuda"] = execution_field("cpu")
    threads: int | None = execution_field(None, ge=1)
    """CPU threads; None uses torch's default."""


class ResultsConfig(FrozenConfig):
    """Configuration of the stage `results`."""

    baseline: str = "penultimate"
    """The arm that the others are compared with."""
    num_resamples: int = Field(10_000, ge=100)
    """Bootstrap resamples; the error of the interval bounds falls with the square root."""
    confidence: float = Field(0.95, gt=0.0, lt=1.0)
    seed: int = Field(0, ge=0)


class ReportConfig(FrozenConfig):
    """Configuration of the stage `report`: its texts and sizes."""

    profile: str = Field(min_length=1)
    """Name of the profile that was run."""
    title: str = "Which layers should condition the image?"
    note: str = ""
    """What this run can and cannot show; blank lines separate paragraphs."""
    num_captions: int = Field(12, ge=0, le=60)
    num_grid_prompts: dict[Benchmark, int] = Field(default_factory=_num_grid_prompts)
    """Rows of each benchmark's sample grid."""
    thumbnail_px: int = Field(160, ge=32, le=512)
    """Width and height of the report's images; at 160 px an image takes about 6 kB."""
    max_num_bytes: int = Field(8_000_000, ge=100_000)
    """Maximum size of the report."""
    stages: tuple[str, ...] = execution_field(())
    """Modules of the graph's stages in its order, in which the report lists them; the graph sets it. Empty: the
    installed stages, by their inputs."""
