"""A profile: the whole resolved configuration of a run, frozen and validated when it is built."""

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

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
from features.config import LatentsConfig, TextFeaturesConfig
from orchestration.launch.launcher import AccelerateLaunch, LaunchForm, LocalLaunch
from orchestration.profiles.model_pins import is_pinned, resolve_models
from pipelines.core.config import FrozenConfig, ModelRef
from pipelines.core.digest import file_sha256
from pipelines.core.errors import ThroughlineError, in_plain_words, problem_in_words
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
AUTOENCODER_FACTOR = 8
"""Image pixels per latent position, of every autoencoder that a profile names."""


class DemoWorld(FrozenConfig):
    """The demo's own web: drawn pictures, LAION metadata that points at them, and the server that hands them out."""

    folder: str
    port: int = Field(8765, ge=1024, le=65535)
    """Port on the loopback; it stands in the metadata's links, so another port means another world."""
    num_images: int = Field(840, ge=20)
    """Rows of metadata, among them rows that the filters must drop and links that don't work."""
    seed: int = Field(0, ge=0)


class Needs(FrozenConfig):
    """What a machine must have for a profile; `throughline doctor` compares."""

    num_gpus: int = Field(0, ge=0)
    gpu_memory_gib: float = Field(0, ge=0)
    """Memory of each GPU."""
    memory_gib: float = Field(4, gt=0)
    disk_gib: float = Field(5, gt=0)


class Profile(FrozenConfig):
    """Everything that decides a run: sources, stages, models, strategies, and how each stage is started."""

    name: str
    home: str
    """Folder for outputs, logs and Dagster's storage."""
    outputs: str | None = None
    """Output root: a folder, or an ``s3://``, ``gs://`` or ``az://`` URL, whose working folder is under `home`; None:
    ``outputs`` under `home`."""
    transfer: TransferConfig = TransferConfig()
    """How files travel to and from an object store."""
    source: tuple[str, ...] = Field(min_length=1)
    """LAION metadata: folders, globs or parquet files, on disk, in object stores, or files by ``https://``."""
    world: DemoWorld | None = None

    laion_subset: LaionSubsetConfig
    laion_selection: LaionSelectionConfig | None = None
    """Duplicates between parts, and a sample over all of them, settled before anything is downloaded. None: each part
    is on its own until `dataset`, and its pictures don't wait for the other parts' rows."""
    images: ImagesConfig
    captions: CaptionsConfig
    shards: ShardsConfig = ShardsConfig()
    latents: LatentsConfig
    text_features: TextFeaturesConfig | None
    """None: training encodes captions as it goes. The cache of all layers costs 2 * layers * width bytes a token."""
    dataset: DatasetConfig = DatasetConfig()

    text_encoder: ModelRef
    autoencoder: ModelRef
    template_version: str
    model: ModelConfig
    training: TrainingConfig
    strategies: tuple[Strategy, ...] = tuple(Strategy)

    pipeline_export: Literal["none", "without_text_encoder", "whole"] = "without_text_encoder"
    """Whether each checkpoint becomes a diffusers pipeline, and whether the text encoder lies in each of them: `whole`
    costs its size for every strategy."""

    arms: tuple[str, ...]
    """Strategies as evaluated, such as ``time_wise+shift``."""
    prompt_sets: PromptSetsConfig
    samples: SamplesConfig
    scores: ScoresConfig
    drawbench_scores: ScoresConfig | None = None
    """Where DrawBench's ratings come from another judge than the Yes and No of `scores`."""
    judge_calibration: JudgeCalibrationConfig
    fusion_analysis: FusionAnalysisConfig = FusionAnalysisConfig()
    trajectory_analysis: TrajectorySettings = TrajectorySettings()
    """Looked at where model.gate_signal is estimated."""
    results: ResultsConfig = ResultsConfig()
    report: ReportConfig

    launches: dict[str, LaunchForm] = Field(default_factory=dict)
    """How a stage is started, by name; a stage not named is one process on this machine."""
    batches: dict[str, int] = Field(default_factory=dict)
    """Most partitions that one process takes, one after the other with the model loaded once; 1 where not named."""
    verify: Verify = "size"
    """What is compared before an output is reused: sizes, or every byte's digest."""
    lock_wait_seconds: float | None = Field(None, ge=0)
    """Longest wait for another run at the same output before a stage fails; None waits as long as that one takes."""
    check_bytes: bool = True
    """Whether the digest check reads files back after they were written; off, it compares sizes."""
    needs: Needs = Needs()

    @model_validator(mode="after")
    def _agree(self) -> Self:
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
        return [f"images.fetch.allowed_private_hosts is {json.dumps(allowed)}, without the demo's own web, {own}"]

    def _model_problems(self) -> list[str]:
        pairs = {
            "samples.text_encoder": (self.samples.text_encoder, self.text_encoder),
            "samples.autoencoder": (self.samples.autoencoder, self.autoencoder),
            "latents.autoencoder": (self.latents.autoencoder, self.autoencoder),
        }
        if self.text_features is not None:
            pairs["text_features.text_encoder"] = (self.text_features.text_encoder, self.text_encoder)
        return [
            f"{where} is {model.id}@{model.revision}, the profile's is {own.id}@{own.revision}"
            for where, (model, own) in pairs.items()
            if model != own
        ]

    def _shape_problems(self) -> list[str]:
        problems = []
        size_px = self.model.latent_size * AUTOENCODER_FACTOR
        if size_px > self.images.transform.size_px:
            problems.append(f"model.latent_size asks for {size_px} px, images are {self.images.transform.size_px} px")
        ungated = [strategy.value for strategy in self.strategies if not strategy.has_time_gate]
        if self.model.gate_signal == "estimated" and ungated:
            problems.append(
                f"model.gate_signal=estimated needs time gates, which {', '.join(ungated)} have not; leave them out of "
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
        return ["judge_calibration.withdrawn is the data set's list; set dataset.withdrawn alone"]

    @property
    def strategy_names(self) -> tuple[str, ...]:
        return tuple(strategy.value for strategy in self.strategies)

    @property
    def arm_names(self) -> tuple[str, ...]:
        return self.arms

    @property
    def images_config(self) -> ImagesConfig:
        """Return the download's configuration: what the subset's lists deny is denied on redirects too."""
        subset, fetch = self.laion_subset, self.images.fetch
        lists = {
            "opt_outs": fetch.opt_outs or subset.opt_outs,
            "urls_denied": fetch.urls_denied or subset.urls_denied,
            "domains_denied": fetch.domains_denied or subset.domains_denied,
        }
        return self.images.model_copy(update={"fetch": fetch.model_copy(update=lists)})

    @property
    def judge_calibration_config(self) -> JudgeCalibrationConfig:
        """Return the judge's trial on training pictures: none of those that the data set leaves out as withdrawn."""
        return self.judge_calibration.model_copy(update={"withdrawn": self.dataset.withdrawn})

    @property
    def benchmarks(self) -> tuple[Benchmark, ...]:
        return self.prompt_sets.benchmarks

    @property
    def store(self) -> StoreConfig | None:
        """The object store that outputs are kept in."""
        return StoreConfig(url=self.outputs, transfer=self.transfer) if self.outputs and "://" in self.outputs else None

    @property
    def output_root(self) -> Path:
        """The folder of outputs; with an object store, the working folder in front of it."""
        store = self.store
        if store is not None:
            return working_folder(Path(self.home), store)
        return Path(self.outputs) if self.outputs else Path(self.home) / "outputs"

    def open_output_root(self) -> Path:
        """Return the folder of outputs, bound to its object store where there is one."""
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
        """Return how a stage is started."""
        return self.launches.get(stage, LocalLaunch())

    def partitions_per_run(self, stage: str) -> int:
        """Return how many partitions of a stage one process takes at most."""
        return self.batches.get(stage, 1)

    def resolved(self, config: ConfigT) -> ConfigT:
        """Return a stage's configuration with every model in it pinned; raises ThroughlineError where one can't be."""
        return resolve_models(config, Path(self.home) / "cache" / "model-commits.json")

    def models(self) -> dict[str, ModelRef]:
        """Return every model by the place it has in the profile."""
        return dict(_models_in(self, ""))

    def warnings(self) -> list[str]:
        """Return what is legal and still worth knowing."""
        return [
            *self._changed_list(),
            *self._uneven_processes(),
            *self._lonely_machines(),
            *self._unpinned_models(),
        ]

    def _changed_list(self) -> Iterator[str]:
        named = self.dataset.withdrawn
        if named is None:
            return
        path = Path(named.path)
        found = file_sha256(path) if path.is_file() else None
        if found != named.sha256:
            said = f"has SHA-256 {found}; name that" if found else "is gone; put it back"
            yield f"dataset.withdrawn: the profile names {path} with SHA-256 {named.sha256}, and it {said}"

    def _uneven_processes(self) -> Iterator[str]:
        launch, wanted = self.launch("checkpoint"), self.training.num_processes
        started = launch.num_processes if isinstance(launch, AccelerateLaunch) else 1
        if started != wanted:
            yield (
                f"training.num_processes is {wanted}, launches.checkpoint starts {started}; set training.num_processes "
                "and launches.checkpoint.num_processes to one number"
            )

    def _lonely_machines(self) -> Iterator[str]:
        for stage, launch in self.launches.items():
            if isinstance(launch, AccelerateLaunch) and launch.num_machines > 1 and launch.is_on_loopback:
                yield (
                    f"launches.{stage}.main_process_ip is {launch.main_process_ip}, which of its "
                    f"num_machines={launch.num_machines} only machine 0 can reach; set it to that one's address"
                )

    def _unpinned_models(self) -> list[str]:
        return [
            f"{where}: {model.id} is not pinned to a commit (revision {model.revision!r}); the first run pins it to "
            "what the hub has then"
            for where, model in self.models().items()
            if not is_pinned(model) and model.path is None
        ]


def _models_in(config: BaseModel, prefix: str) -> list[tuple[str, ModelRef]]:
    found: list[tuple[str, ModelRef]] = []
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, ModelRef):
            found.append((prefix + name, value))
        elif isinstance(value, BaseModel):
            found += _models_in(value, f"{prefix}{name}.")
    return found


ProfileFunction = Callable[[Path], Profile]


def load_profile(name: str, home: Path, changes: Sequence[str] = ()) -> Profile:
    """Return the profile of that name, or the one a TOML or JSON file makes of another, with `changes` applied.

    A file names its ``base`` and overrides fields in tables of the same shape as the profile. A change is
    ``field.field=value``, the value as JSON or as plain text. Raises ThroughlineError with one line per wrong field.
    """
    from orchestration.profiles.library import PROFILES

    overrides: dict[str, Any] = {}
    if name not in PROFILES:
        base, overrides = _read_profile_file(name, PROFILES)
    else:
        base = name
    for change in changes:
        path, separator, text = change.partition("=")
        if not separator or not path:
            raise ThroughlineError(f"--set {change}: expected field.field=value")
        _put(overrides, path.split("."), _parse(text), change)
    profile = PROFILES[base](home)
    if not overrides:
        return profile
    merged = _merge(profile.model_dump(mode="json"), overrides)
    try:
        return Profile.model_validate(merged)
    except ValidationError as error:
        raise ThroughlineError(f"profile {name}: {_problems(error)}") from error


def _read_profile_file(name: str, known: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    path = Path(name)
    if path.suffix not in {".toml", ".json"}:
        raise ThroughlineError(f"no profile {name!r}; there are {', '.join(known)}, or name a .toml file")
    try:
        text = path.read_text()
        content = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        said = f"{path}: can't be read as a profile: {in_plain_words(error)}"
        raise ThroughlineError(f"{said}; name another file, or one of {', '.join(known)}") from error
    except ValueError as error:
        raise ThroughlineError(f"{path}: can't be read as a profile ({error}); mend that line") from error
    base = content.pop("base", None)
    if base not in known:
        raise ThroughlineError(f'{path}: base is {base!r}; start the file with base = "<one of {", ".join(known)}>"')
    return base, content


def _put(overrides: dict[str, Any], path: list[str], value: Any, change: str) -> None:
    for name in path[:-1]:
        overrides = overrides.setdefault(name, {})
        if not isinstance(overrides, dict):
            raise ThroughlineError(f"--set {change}: {name} was set to a plain value before")
    overrides[path[-1]] = value


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _merge(base: Any, overrides: Mapping[str, Any]) -> Any:
    """Return `base` with `overrides` laid over it; a field that a union would not have is left to validation."""
    if not isinstance(base, dict):
        return dict(overrides)
    merged = dict(base)
    for name, value in overrides.items():
        if isinstance(value, Mapping):
            merged[name] = _merge(base.get(name), value)
        else:
            merged[name] = value
    return merged


def _problems(error: ValidationError) -> str:
    def said(problem: Mapping[str, Any]) -> str:
        path = ".".join(map(str, problem["loc"]))  # empty where fields contradict each other: the text names them
        return f"{path}: {problem_in_words(problem)}" if path else problem_in_words(problem)

    return "; ".join(said(problem) for problem in error.errors())
