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

    Raises ThroughlineError where the key isn't one.
    """
    arm, _, benchmark = (partition or "").partition("|")
    if not re.fullmatch(r"[a-z_]+(\+[a-z_]+)*", arm) or benchmark not in BENCHMARKS:
        raise ThroughlineError(
            f"partition {partition!r}: expected '<arm>|<benchmark>' with a benchmark of {', '.join(BENCHMARKS)}"
        )
    return arm, benchmark


class PromptFile(FrozenConfig):
    """A benchmark's file, pinned by content."""

    path: str = execution_field(min_length=1)
    """Where the file lies on this machine."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    num_prompts: int | None = Field(None, ge=1)
    """Prompts that the file must hold; None takes what is there."""


class PromptSetsConfig(FrozenConfig):
    """Which benchmarks' prompts are used; a benchmark without file is left out of the evaluation."""

    geneval: PromptFile | None = None
    """``evaluation_metadata.jsonl``."""
    genai_image: PromptFile | None = None
    """``genai_image.json``: the prompts of GenAI-Bench."""
    genai_skills: PromptFile | None = None
    """``genai_skills.json``: the skills of GenAI-Bench's prompts."""
    drawbench: PromptFile | None = None
    """``DrawBench.csv``."""
    limits: dict[Benchmark, int] = Field(default_factory=dict)
    """At most so many prompts of a benchmark, spread over its skills; a benchmark not named is used whole."""

    @model_validator(mode="after")
    def _check(self) -> "PromptSetsConfig":
        if (self.genai_image is None) != (self.genai_skills is None):
            raise ValueError("GenAI-Bench needs both genai_image and genai_skills")
        if not self.benchmarks:
            raise ValueError("no benchmark has a prompt file; name at least one")
        for benchmark, limit in self.limits.items():
            if limit < 1:
                raise ValueError(f"limits.{benchmark} is {limit}; leave a benchmark out by giving it no file")
        return self

    @property
    def benchmarks(self) -> tuple[Benchmark, ...]:
        """The benchmarks that have prompts, in reporting order."""
        files = {"geneval": self.geneval, "genai_bench": self.genai_image, "drawbench": self.drawbench}
        return tuple(name for name in BENCHMARKS if files[name] is not None)

    def limit(self, benchmark: Benchmark) -> int | None:
        return self.limits.get(benchmark)


class SamplesConfig(FrozenConfig):
    """How images are made for the prompts of one arm and benchmark."""

    text_encoder: ModelRef
    """The frozen encoder that made the training's text features."""
    autoencoder: ModelRef
    """The autoencoder that made the training's latents."""
    sampler: SamplerConfig
    """Steps, guidance and schedule; the arm's own options (Eq. 11) come from its name."""
    seed: int = Field(0, ge=0)
    """The noise of an image depends on (seed, prompt, sample index) alone, so all arms start from the same noise."""
    images_per_prompt: dict[Benchmark, int] = Field(default_factory=_images_per_prompt)
    """Published protocols: GenEval 4, the others 1."""
    prompts_per_unit: int = Field(16, ge=1)
    """Prompts that are sampled together: more use the device better, a kill loses at most so many prompts."""
    device: Literal["cpu", "cuda"] = execution_field("cpu")
    threads: int | None = execution_field(None, ge=1)
    """CPU threads; None leaves torch's choice. Pixels are bit-exact for equal thread counts."""
    prompt_memory_bytes: int = execution_field(2 << 30, ge=0)
    """Encoded prompts kept for the next arms of the same process; about 6 MB a prompt at the paper's scale."""

    @model_validator(mode="after")
    def _check(self) -> "SamplesConfig":
        for benchmark in BENCHMARKS:
            if self.images_per_prompt.get(benchmark, 0) < 1:
                raise ValueError(f"images_per_prompt.{benchmark} must be 1 or more")
        return self


class ScoresConfig(FrozenConfig):
    """Which judge model scores the samples, and how it is asked."""

    judge: EngineConfig
    """The model that answers Yes or No and rates; its name stands beside every score."""
    pool: PoolConfig = execution_field(PoolConfig())
    images_per_unit: int = Field(64, ge=1)
    """Images that are judged together: their questions form the engine's batches, so it is part of the identity."""
    max_rating_tokens: int = Field(128, ge=16)
    """Longest rating; a longer one is cut, and what is missing then is counted."""
    max_unscored_share: float = Field(0.5, ge=0.0, le=1.0)
    """Share of scores that may be missing before the stage stops, because the judge can't do what is asked."""


class JudgeCalibrationConfig(FrozenConfig):
    """How the judge is tried on real images, each beside its own caption and beside that of another image."""

    judge: EngineConfig
    pool: PoolConfig = execution_field(PoolConfig())
    num_images: int = Field(128, ge=2)
    """Images that are asked about, twice each."""
    images_per_unit: int = Field(64, ge=1)
    withdrawn: EntryList | None = added_field(None)
    """Sample keys of rows that must not be used any more; a profile gives the data set's list."""


class FusionAnalysisConfig(FrozenConfig):
    """At which times the fusion weights are read."""

    num_times: int = Field(21, ge=2)
    """Times from t = 0 (noise) to t = 1 (data), evenly spaced, ends included; the paper draws 21."""


class TrajectorySettings(FrozenConfig):
    """On what the time that a head reads off latents is compared with the schedule's."""

    guidance_scales: tuple[float, ...] = Field((1.0, 3.0, 6.0), min_length=1)
    """Guidance at which images are drawn, each once; 1 is the model alone."""
    num_samples: int = Field(24, ge=1)
    """Held-out samples that are noised, and whose captions an image is drawn for at each guidance."""
    seed: int = Field(0, ge=0)
    """Of the noise that images start from."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.guidance_scales)) < len(self.guidance_scales) or min(self.guidance_scales) < 0:
            raise ValueError(f"guidance_scales {self.guidance_scales}: expected different scales, none below 0")
        return self


class TrajectoryAnalysisConfig(TrajectorySettings):
    """Configuration of the stage `trajectory_analysis`."""

    text_encoder: ModelRef
    """The frozen encoder that made the training's text features."""
    sampler: SamplerConfig
    """Steps, schedule and images per batch; its guidance is not looked at."""
    device: Literal["cpu", "cuda"] = execution_field("cpu")
    threads: int | None = execution_field(None, ge=1)
    """CPU threads; None leaves torch's choice."""


class ResultsConfig(FrozenConfig):
    """How the tables are made."""

    baseline: str = "penultimate"
    """The arm that the others are compared with."""
    num_resamples: int = Field(10_000, ge=100)
    """Bootstrap resamples; the intervals' own error falls with the root of it."""
    confidence: float = Field(0.95, gt=0.0, lt=1.0)
    seed: int = Field(0, ge=0)


class ReportConfig(FrozenConfig):
    """What the report shows of everything there is."""

    profile: str = Field(min_length=1)
    """Name of the profile that was run."""
    title: str = "Which layers should condition the image?"
    note: str = ""
    """What this run can and can't show, in the profile's words; blank lines separate paragraphs."""
    num_captions: int = Field(12, ge=0, le=60)
    num_grid_prompts: dict[Benchmark, int] = Field(default_factory=_num_grid_prompts)
    """Rows of each benchmark's sample grid."""
    thumbnail_px: int = Field(160, ge=32, le=512)
    """Width and height of pictures in the report; 160 px costs about 6 kB a picture."""
    max_num_bytes: int = Field(8_000_000, ge=100_000)
    """Size that the report may not exceed."""
    stages: tuple[str, ...] = execution_field(())
    """Modules of the graph's stages in its order, in which the report lists them; the graph sets it. Empty: the
    installed stages, by their inputs."""
