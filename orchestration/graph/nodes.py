"""The graph: every asset, from LAION's metadata to the report."""

from evaluation.config import TrajectoryAnalysisConfig
from orchestration.graph.graph import Graph, Group, Input, Node, PartitionKind
from orchestration.profiles.profile import Profile
from pipelines.core.config import FrozenConfig
from pipelines.download.config import ImagesConfig
from pipelines.laion.index import ENTRY_FILE, known_entries
from pipelines.laion.selection import PART_ROWS_FILE
from pipelines.laion.sources import scan_index
from training.config import CheckpointConfig, PipelineExportConfig, Strategy


def _index_config(profile: Profile, _: str | None) -> FrozenConfig:
    return scan_index(profile.source, profile.digest_cache)


def _images_before_last_pass(config: FrozenConfig) -> FrozenConfig | None:
    assert isinstance(config, ImagesConfig)
    return config.model_copy(update={"later_passes": config.later_passes - 1}) if config.later_passes else None


def _scores_config(profile: Profile, partition: str | None) -> FrozenConfig:
    rates = (partition or "").endswith("|drawbench")
    return (profile.drawbench_scores if rates else None) or profile.scores


def _checkpoint_config(profile: Profile, strategy: str | None) -> FrozenConfig:
    return CheckpointConfig(
        strategy=Strategy(strategy or ""),
        model=profile.model,
        training=profile.training,
        text_encoder=profile.text_encoder,
        template_version=profile.template_version,
    )


def _selection_config(profile: Profile, _: str | None) -> FrozenConfig:
    assert profile.laion_selection is not None, "the node is disabled without it"
    return profile.laion_selection


def _pipeline_export_config(profile: Profile, _: str | None) -> FrozenConfig:
    return PipelineExportConfig(
        text_encoder=profile.text_encoder,
        autoencoder=profile.autoencoder,
        sampler=profile.samples.sampler,
        save_text_encoder=profile.pipeline_export == "whole",
    )


def _trajectory_analysis_config(profile: Profile, _: str | None) -> FrozenConfig:
    samples = profile.samples
    return TrajectoryAnalysisConfig(
        **profile.trajectory_analysis.model_dump(),
        text_encoder=profile.text_encoder,
        sampler=samples.sampler.model_copy(update={"guidance_scale": 1.0, "gate_shift": False}),
        device=samples.device,
        threads=samples.threads,
    )


def _text_features_config(profile: Profile, _: str | None) -> FrozenConfig:
    assert profile.text_features is not None, "the node is disabled without it"
    return profile.text_features


def _report_config(profile: Profile, _: str | None) -> FrozenConfig:
    return profile.report.model_copy(update={"stages": tuple(node.module for node in GRAPH.nodes.values())})


_INDEX = Input(name="index", asset="laion_index")
"""Read by every roll-up of parts: without it Dagster would not notice a removed part, and one lineage could have
several indexes."""

DATA_NODES = (
    Node(
        name="laion_index",
        module="pipelines.laion.index",
        group=Group.DATA,
        configure=_index_config,
        known_files=known_entries,
        kinds=frozenset({"parquet"}),
    ),
    Node(
        name="laion_subset",
        module="pipelines.laion.subset",
        group=Group.DATA,
        configure=lambda profile, _: profile.laion_subset,
        partition=PartitionKind.PART,
        inputs=(Input(name="index", asset="laion_index", file=ENTRY_FILE),),
        kinds=frozenset({"parquet"}),
    ),
    Node(
        name="laion_selection",
        module="pipelines.laion.selection",
        group=Group.DATA,
        configure=_selection_config,
        inputs=(_INDEX, Input(name="subset", asset="laion_subset")),
        kinds=frozenset({"parquet"}),
        is_enabled=lambda profile: profile.laion_selection is not None,
    ),
    Node(
        name="images",
        module="pipelines.download.images",
        group=Group.DATA,
        configure=lambda profile, _: profile.images_config,
        partition=PartitionKind.PART,
        inputs=(
            Input(name="selection", asset="laion_selection", file=PART_ROWS_FILE),
            Input(name="subset", asset="laion_subset", replaced_by="laion_selection"),
        ),
        incremental_from=_images_before_last_pass,
        kinds=frozenset({"http", "parquet"}),
    ),
    Node(
        name="captions",
        module="recaption.captions",
        group=Group.DATA,
        configure=lambda profile, _: profile.captions,
        partition=PartitionKind.PART,
        inputs=(Input(name="images", asset="images"),),
        kinds=frozenset({"vllm", "ray"}),
    ),
    Node(
        name="shards",
        module="pipelines.shards.shards",
        group=Group.DATA,
        configure=lambda profile, _: profile.shards,
        partition=PartitionKind.PART,
        inputs=(Input(name="images", asset="images"), Input(name="captions", asset="captions")),
        kinds=frozenset({"webdataset"}),
    ),
    Node(
        name="latents",
        module="features.latents",
        group=Group.DATA,
        configure=lambda profile, _: profile.latents,
        partition=PartitionKind.PART,
        inputs=(Input(name="shards", asset="shards"),),
        kinds=frozenset({"pytorch", "diffusers"}),
    ),
    Node(
        name="text_features",
        module="features.text_features",
        group=Group.DATA,
        configure=_text_features_config,
        partition=PartitionKind.PART,
        inputs=(Input(name="shards", asset="shards"),),
        kinds=frozenset({"pytorch", "transformers"}),
        is_enabled=lambda profile: profile.text_features is not None,
    ),
    Node(
        name="dataset",
        module="pipelines.dataset.dataset",
        group=Group.DATA,
        configure=lambda profile, _: profile.dataset,
        inputs=(
            _INDEX,
            Input(name="selection", asset="laion_selection"),
            Input(name="shards", asset="shards"),
            Input(name="latents", asset="latents"),
            Input(name="text_features", asset="text_features"),
        ),
        kinds=frozenset({"parquet"}),
    ),
)

TRAINING_NODES = (
    Node(
        name="checkpoint",
        module="training.loop.checkpoint",
        group=Group.TRAINING,
        configure=_checkpoint_config,
        partition=PartitionKind.STRATEGY,
        inputs=(
            Input(name="dataset", asset="dataset"),
            Input(name="shards", asset="shards", is_dagster_dep=False),
            Input(name="latents", asset="latents", is_dagster_dep=False),
            Input(name="text_features", asset="text_features", is_dagster_dep=False),
        ),
        kinds=frozenset({"pytorch", "accelerate"}),
    ),
    Node(
        name="pipeline_export",
        module="training.export.pipeline_export",
        group=Group.TRAINING,
        configure=_pipeline_export_config,
        partition=PartitionKind.STRATEGY,
        inputs=(Input(name="checkpoint", asset="checkpoint"),),
        kinds=frozenset({"pytorch", "diffusers"}),
        is_enabled=lambda profile: profile.pipeline_export != "none",
    ),
)

EVALUATION_NODES = (
    Node(
        name="prompt_sets",
        module="evaluation.benchmarks.prompt_sets",
        group=Group.EVALUATION,
        configure=lambda profile, _: profile.prompt_sets,
    ),
    Node(
        name="samples",
        module="evaluation.benchmarks.samples",
        group=Group.EVALUATION,
        configure=lambda profile, _: profile.samples,
        partition=PartitionKind.ARM_BENCHMARK,
        inputs=(Input(name="checkpoint", asset="checkpoint"), Input(name="prompt_sets", asset="prompt_sets")),
        kinds=frozenset({"pytorch", "diffusers"}),
    ),
    Node(
        name="scores",
        module="evaluation.judging.scores",
        group=Group.EVALUATION,
        configure=_scores_config,
        partition=PartitionKind.ARM_BENCHMARK,
        inputs=(Input(name="samples", asset="samples"), Input(name="prompt_sets", asset="prompt_sets")),
        kinds=frozenset({"vllm", "ray"}),
    ),
    Node(
        name="judge_calibration",
        module="evaluation.judging.calibration",
        group=Group.EVALUATION,
        configure=lambda profile, _: profile.judge_calibration_config,
        inputs=(_INDEX, Input(name="images", asset="images"), Input(name="captions", asset="captions")),
        kinds=frozenset({"vllm", "ray"}),
    ),
    Node(
        name="fusion_analysis",
        module="evaluation.analysis.fusion_analysis",
        group=Group.EVALUATION,
        configure=lambda profile, _: profile.fusion_analysis,
        partition=PartitionKind.STRATEGY,
        inputs=(Input(name="checkpoint", asset="checkpoint"),),
        kinds=frozenset({"svg"}),
    ),
    Node(
        name="trajectory_analysis",
        module="evaluation.analysis.trajectory_analysis",
        group=Group.EVALUATION,
        configure=_trajectory_analysis_config,
        partition=PartitionKind.STRATEGY,
        inputs=(
            Input(name="checkpoint", asset="checkpoint"),
            Input(name="dataset", asset="dataset"),
            Input(name="shards", asset="shards", is_dagster_dep=False),
            Input(name="latents", asset="latents", is_dagster_dep=False),
            Input(name="text_features", asset="text_features", is_dagster_dep=False),
        ),
        kinds=frozenset({"pytorch", "diffusers"}),
        is_enabled=lambda profile: profile.model.gate_signal == "estimated",
    ),
    Node(
        name="results",
        module="evaluation.analysis.results",
        group=Group.EVALUATION,
        configure=lambda profile, _: profile.results,
        inputs=(
            Input(name="scores", asset="scores"),
            Input(name="checkpoint", asset="checkpoint"),
            Input(name="fusion_analysis", asset="fusion_analysis"),
        ),
        kinds=frozenset({"table"}),
    ),
    Node(
        name="report",
        module="evaluation.report.report",
        group=Group.EVALUATION,
        configure=_report_config,
        inputs=(
            Input(name="results", asset="results"),
            Input(name="judge_calibration", asset="judge_calibration"),
            Input(name="trajectory_analysis", asset="trajectory_analysis"),
        ),
        kinds=frozenset({"html"}),
    ),
)

GRAPH = Graph(DATA_NODES + TRAINING_NODES + EVALUATION_NODES)
