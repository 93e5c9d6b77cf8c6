"""A profile: the complete configuration of a run, frozen and validated on construction."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from evaluation.config import (
    Benchmark,
    FusionAnalysisConfig,
    JudgeCalibrationConfig,
    PromptSetsConfig,
    ReportConfig,
    ResultsConfig,
    SamplesConfig,
    ScoresConfig,
    TrajectorySettings,
)
from features.config import AUTOENCODER_FACTOR, LatentsConfig, TextFeaturesConfig
from orchestration.launch.launcher import AccelerateLaunch, LaunchForm, LocalLaunch
from orchestration.profiles.model_pins import is_pinned, resolve_models
from pipelines.core.config import FrozenConfig, ModelRef
from pipelines.core.digest import file_sha256
from pipelines.dataset.config import DatasetConfig
from pipelines.download.config import ImagesConfig
from pipelines.laion.config import LaionSelectionConfig, LaionSubsetConfig
from pipelines.runner.outputs import Verify
from pipelines.shards.config import ShardsConfig
from pipelines.storage.config import StoreConfig, TransferConfig
from pipelines.storage.mirror import bind, working_folder
from recaption.config import CaptionsConfig
from training.config import Arm, ModelConfig, Strategy, TrainingConfig

ConfigT = TypeVar("ConfigT", bound=BaseModel)


class DemoWorld(FrozenConfig):
    """The demo's own web: rendered images, LAION metadata that links to them, and the server that serves them."""

    folder: str
    port: int = Field(8765, ge=1024, le=65535)
    """Port on the loopback interface; part of every link in the metadata, so another port means another world."""
    num_images: int = Field(840, ge=20)
    """Rows of metadata, including rows that the filters must drop and broken links."""
    seed: int = Field(0, ge=0)


class MachineRequirements(FrozenConfig):
    """The hardware that a profile requires of each machine; `throughline doctor` checks it."""

    num_gpus: int = Field(0, ge=0)
    gpu_memory_gib: float = Field(0, ge=0)
    """Memory of each GPU."""
    memory_gib: float = Field(4, gt=0)
    disk_gib: float = Field(5, gt=0)


class Profile(FrozenConfig):
    """Everything that determines a run: sources, stages, models, strategies, and how each stage is launched."""

    name: str
    home: str
    """Folder for outputs, logs and Dagster's storage."""
    outputs: str | None = None
    """Output root: a folder, or an ``s3://``, ``gs://`` or ``az://`` URL, whose working folder is under `home`; None:
    ``outputs`` under `home`."""
    transfer: TransferConfig = TransferConfig()
    """Transfers to and from an object store."""
    source: tuple[str, ...] = Field(min_length=1)
    """LAION metadata: folders, globs or parquet files, on disk, in object stores, or files by ``https://``."""
    world: DemoWorld | None = None

    laion_subset: LaionSubsetConfig
    laion_selection: LaionSelectionConfig | None = None
    """Deduplication and sampling over all parts before the download. None: parts stay independent until `dataset`, so a
    part's download need not wait for the others' rows."""
    images: ImagesConfig
    captions: CaptionsConfig
    shards: ShardsConfig = ShardsConfig()
    latents: LatentsConfig
    text_features: TextFeaturesConfig | None
    """None: training encodes captions on the fly. The cache of all layers takes 2 * layers * width bytes per token."""
    dataset: DatasetConfig = DatasetConfig()

    text_encoder: ModelRef
    autoencoder: ModelRef
    template_version: str
    model: ModelConfig
    training: TrainingConfig
    strategies: tuple[Strategy, ...] = tuple(Strategy)

    pipeline_export: Literal["none", "without_text_encoder", "whole"] = "without_text_encoder"
    """Diffusers pipelines of checkpoints: none, without the text encoder, or `whole`, which stores the encoder once per
    strategy."""

    arms: tuple[str, ...]
    """Strategies to evaluate, such as ``time_wise+shift``."""
    prompt_sets: PromptSetsConfig
    samples: SamplesConfig
    scores: ScoresConfig
    drawbench_scores: ScoresConfig | None = None
    """DrawBench ratings by another judge than that of `scores`."""
    judge_calibration: JudgeCalibrationConfig
    fusion_analysis: FusionAnalysisConfig = FusionAnalysisConfig()
    trajectory_analysis: TrajectorySettings = TrajectorySettings()
    """Used if model.gate_signal is estimated."""
    results: ResultsConfig = ResultsConfig()
    report: ReportConfig

    launches: dict[str, LaunchForm] = Field(default_factory=dict)
    """Launch forms by stage; other stages run as one process on this machine."""
    batches: dict[str, int] = Field(default_factory=dict)
    """Most partitions that one process computes in sequence with its model loaded once, by stage; default 1."""
    verify: Verify = "size"
    """Check before an output is reused: file sizes, or digests of every byte."""
    lock_wait_seconds: float | None = Field(None, ge=0)
    """Longest wait for another run's lock on the same output before a stage fails; None waits without limit."""
    check_bytes: bool = True
    """Make the digest check read files back after they were written; False compares only sizes."""
    needs: MachineRequirements = MachineRequirements()

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        problems = [
            *self._output_problems(), *self._world_problems(), *self._model_problems(), *self._shape_problems(),
            *self._arm_problems(),
            *self._list_problems(),
        ]  # fmt: skip
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _output_problems(self) -> list[str]:
        if self.outputs is None or "://" not in self.outputs:
            return []
        try:
            StoreConfig(url=self.outputs)
        except ValidationError as error:
            return [f"outputs: {problem['msg'].removeprefix('Value error, ')}" for problem in error.errors()]
        return []

    def _world_problems(self) -> list[str]:
        allowed = self.images.fetch.allowed_private_hosts
        if self.world is None or (own := f"127.0.0.1:{self.world.port}") in allowed:
            return []
        found = f"images.fetch.allowed_private_hosts is {json.dumps(allowed)}"
        return [f"{found}, expected it to contain the demo's web server, {own}"]

    def _model_problems(self) -> list[str]:
        pairs = {
            "samples.text_encoder": (self.samples.text_encoder, self.text_encoder),
            "samples.autoencoder": (self.samples.autoencoder, self.autoencoder),
            "latents.autoencoder": (self.latents.autoencoder, self.autoencoder),
        }
        if self.text_features is not None:
            pairs["text_features.text_encoder"] = (self.text_features.text_encoder, self.text_encoder)
        return [
            f"{field} is {model.id}@{model.revision}, the profile's is {own.id}@{own.revision}"
            for field, (model, own) in pairs.items()
            if model != own
        ]

    def _shape_problems(self) -> list[str]:
        problems = []
        size_px = self.model.latent_size * AUTOENCODER_FACTOR
        if size_px > self.images.transform.size_px:
            problems.append(f"model.latent_size requires {size_px} px, images are {self.images.transform.size_px} px")
        ungated = [strategy.value for strategy in self.strategies if not strategy.has_time_gate]
        if self.model.gate_signal == "estimated" and ungated:
            problems.append(
                f"model.gate_signal=estimated needs time gates, which {', '.join(ungated)} lack; remove them from "
                "strategies and arms"
            )
        return problems

    def _arm_problems(self) -> list[str]:
        problems = []
        if not self.arms:
            problems.append("arms is empty; name at least one strategy to evaluate")
        problems += [
            f"arm {arm.name} needs strategy {arm.strategy.value}, which is not trained"
            for arm in map(Arm.parse, self.arms)
            if arm.strategy not in self.strategies
        ]
        if self.arms and self.results.baseline not in self.arms:
            problems.append(f"results.baseline {self.results.baseline} is not among the arms")
        return problems

    def _list_problems(self) -> list[str]:
        if self.judge_calibration.withdrawn is None:
            return []
        return ["judge_calibration.withdrawn is taken from the data set; set only dataset.withdrawn"]

    @property
    def strategy_names(self) -> tuple[str, ...]:
        return tuple(strategy.value for strategy in self.strategies)

    @property
    def arm_names(self) -> tuple[str, ...]:
        return self.arms

    @property
    def images_config(self) -> ImagesConfig:
        """Return the download's configuration, in which the subset's deny lists also apply to redirects."""
        subset, fetch = self.laion_subset, self.images.fetch
        lists = {
            "opt_outs": fetch.opt_outs or subset.opt_outs,
            "urls_denied": fetch.urls_denied or subset.urls_denied,
            "domains_denied": fetch.domains_denied or subset.domains_denied,
        }
        return self.images.model_copy(update={"fetch": fetch.model_copy(update=lists)})

    @property
    def judge_calibration_config(self) -> JudgeCalibrationConfig:
        """Return the configuration of judge calibration, without the rows withdrawn from the data set."""
        return self.judge_calibration.model_copy(update={"withdrawn": self.dataset.withdrawn})

    @property
    def benchmarks(self) -> tuple[Benchmark, ...]:
        return self.prompt_sets.benchmarks

    @property
    def store(self) -> StoreConfig | None:
        """The object store of outputs, if any."""
        return StoreConfig(url=self.outputs, transfer=self.transfer) if self.outputs and "://" in self.outputs else None

    @property
    def output_root(self) -> Path:
        """The output root; with an object store, its local working folder."""
        store = self.store
        if store is not None:
            return working_folder(Path(self.home), store)
        return Path(self.outputs) if self.outputs else Path(self.home) / "outputs"

    def open_output_root(self) -> Path:
        """Return the output root, bound to its object store if there is one."""
        if self.store is not None:
            bind(self.output_root, self.store)
        return self.output_root

    @property
    def log_folder(self) -> Path:
        return Path(self.home) / "logs"

    @property
    def digest_cache(self) -> Path:
        return Path(self.home) / "cache" / "source-digests.json"

    def launch(self, stage: str) -> LaunchForm:
        """Return the launch form of a stage."""
        return self.launches.get(stage, LocalLaunch())

    def partitions_per_run(self, stage: str) -> int:
        """Return the most partitions of a stage that one process computes."""
        return self.batches.get(stage, 1)

    def resolved(self, config: ConfigT) -> ConfigT:
        """Return a stage's configuration with every model pinned; raises ThroughlineError if one can't be."""
        return resolve_models(config, Path(self.home) / "cache" / "model-commits.json")

    def models(self) -> dict[str, ModelRef]:
        """Return every model by its field path."""
        return dict(_models_in(self, ""))

    def warnings(self) -> list[str]:
        """Return warnings about valid but questionable settings."""
        return [
            *self._changed_list_warnings(),
            *self._process_count_warnings(),
            *self._unreachable_machine_warnings(),
            *self._unpinned_model_warnings(),
        ]

    def _changed_list_warnings(self) -> Iterator[str]:
        expected = self.dataset.withdrawn
        if expected is None:
            return
        path = Path(expected.path)
        found = file_sha256(path) if path.is_file() else None
        if found != expected.sha256:
            problem = f"has SHA-256 {found}; update the profile" if found else "is missing; restore it"
            yield f"dataset.withdrawn: the profile names {path} with SHA-256 {expected.sha256}, but it {problem}"

    def _process_count_warnings(self) -> Iterator[str]:
        launch, expected = self.launch("checkpoint"), self.training.num_processes
        launched = launch.num_processes if isinstance(launch, AccelerateLaunch) else 1
        if launched != expected:
            yield (
                f"training.num_processes is {expected}, launches.checkpoint starts {launched}; set "
                "training.num_processes and launches.checkpoint.num_processes to the same number"
            )

    def _unreachable_machine_warnings(self) -> Iterator[str]:
        for stage, launch in self.launches.items():
            if isinstance(launch, AccelerateLaunch) and launch.num_machines > 1 and launch.is_on_loopback:
                yield (
                    f"launches.{stage}.main_process_ip is {launch.main_process_ip}, which only machine 0 of "
                    f"num_machines={launch.num_machines} can reach; set it to that machine's address"
                )

    def _unpinned_model_warnings(self) -> list[str]:
        return [
            f"{field}: {model.id} is not pinned to a commit (revision {model.revision!r}); the first run pins it to "
            "the hub's current one"
            for field, model in self.models().items()
            if not is_pinned(model) and model.path is None
        ]


def _models_in(config: BaseModel, prefix: str) -> list[tuple[str, ModelRef]]:
    models: list[tuple[str, ModelRef]] = []
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, ModelRef):
            models.append((prefix + name, value))
        elif isinstance(value, BaseModel):
            models += _models_in(value, f"{prefix}{name}.")
    return models
