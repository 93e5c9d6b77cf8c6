"""Dagster's entry point: the graph of the profile that the environment names, over the outputs under its home."""

import dagster as dg

from orchestration.defs.assets import build_asset, build_files_asset
from orchestration.defs.jobs import EVALUATION_JOB, EVERYTHING_JOB, build_job
from orchestration.demo_services import service_hooks
from orchestration.graph.execution import Execution
from orchestration.graph.graph import Graph, Group
from orchestration.graph.nodes import GRAPH
from orchestration.graph.resolution import Plan
from orchestration.profiles.loading import load_profile
from orchestration.profiles.profile import Profile
from pipelines.core.environment import home_folder, profile_name


def build_execution(profile: Profile, graph: Graph = GRAPH) -> Execution:
    """Return the graph under a profile, ready to run."""
    return Execution(
        plan=Plan(graph, profile, profile.open_output_root()),
        log_folder=profile.log_folder,
        hooks=service_hooks(profile),
    )


def build_definitions(execution: Execution) -> dg.Definitions:
    """Return assets, checks and jobs."""
    nodes = list(execution.plan.graph.nodes.values())
    evaluation = [node for node in nodes if node.group is Group.EVALUATION]
    jobs = [build_job(EVERYTHING_JOB, nodes, execution, "Every asset of the graph, all partitions.")]
    if evaluation:
        jobs.append(
            build_job(EVALUATION_JOB, evaluation, execution, "The evaluation alone, from existing checkpoints.")
        )
    assets = [build_asset(node, execution) for node in nodes]
    assets += [asset for node in nodes if (asset := build_files_asset(node, execution)) is not None]
    return dg.Definitions(assets=assets, jobs=jobs, executor=dg.in_process_executor)


@dg.definitions
def definitions() -> dg.Definitions:
    """Return the definitions of this process's profile."""
    return build_definitions(build_execution(load_profile(profile_name(), home_folder())))
