"""The command `throughline export`, and the lookup of finished checkpoints: a strategy's newest, or one by folder."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.cli.options import add_profile_arguments, load_profile
from pipelines.core.errors import ThroughlineError

if TYPE_CHECKING:
    from orchestration.profiles.profile import Profile
    from pipelines.runner.outputs import StageOutput
    from training.config import Strategy

_STAGE = "checkpoint"


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `export`."""
    add_profile_arguments(parser)
    parser.add_argument("--strategy", metavar="NAME", help="export this strategy's newest checkpoint")
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="export the checkpoint in this folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new or an empty folder")
    parser.add_argument(
        "--without-text-encoder",
        action="store_true",
        help="refer to the encoder by hub ID and commit instead of saving it",
    )


def run_export(arguments: argparse.Namespace) -> int:
    """Write a checkpoint as a diffusers pipeline and print its folder; return 0."""
    from training.export.export import export_pipeline

    profile = load_profile(arguments.profile, arguments.changes)
    if (arguments.strategy is None) == (arguments.checkpoint is None):
        raise ThroughlineError("name either a strategy with --strategy or a checkpoint's folder with --checkpoint")
    if arguments.checkpoint is not None:
        source = checkpoint_in(arguments.checkpoint)
    else:
        source = newest_checkpoint(profile, parse_strategy(arguments.strategy), arguments.profile)
    samples = profile.resolved(profile.samples)
    folder = export_pipeline(
        source, samples.text_encoder, samples.autoencoder, samples.sampler, arguments.out,
        save_text_encoder=not arguments.without_text_encoder,
    )  # fmt: skip
    print(folder)
    return 0


def parse_strategy(name: str) -> "Strategy":
    """Return the strategy called `name`; raises ThroughlineError that lists the known ones."""
    from training.config import Strategy

    try:
        return Strategy(name)
    except ValueError:
        known = ", ".join(strategy.value for strategy in Strategy)
        raise ThroughlineError(f"no strategy {name!r}; known: {known}") from None


def newest_checkpoint(profile: "Profile", strategy: "Strategy", profile_argument: str | None = None) -> "StageOutput":
    """Return the checkpoint of `strategy` that finished last, among those trained with the profile's text encoder.

    Raises ThroughlineError if there is none, with the command that trains one; `profile_argument` is how the user named
    the profile.
    """
    from pipelines.core.manifest import MANIFEST_NAME
    from pipelines.runner.outputs import StageOutput
    from pipelines.storage.mirror import location_of, sync_manifests
    from training.models.saved_model import read_conditioning

    candidates = []
    root = profile.open_output_root()
    sync_manifests(root, _STAGE)
    for path in (root / _STAGE).glob(f"*/{MANIFEST_NAME}"):
        checkpoint = StageOutput.load(path)
        conditioning = read_conditioning(checkpoint) if checkpoint.manifest.partition == strategy.value else None
        if conditioning is None or conditioning.text_encoder_id != profile.text_encoder.id:
            continue
        environment = checkpoint.manifest.environment
        candidates.append((environment.ended_at if environment else "", checkpoint.data_version, checkpoint))
    if not candidates:
        raise ThroughlineError(
            f"no finished checkpoint of {strategy.value} in {location_of(root)}; train one with "
            f"`throughline run --profile {profile_argument or profile.name} --select +checkpoint`"
        )
    return _verified(max(candidates)[2])


def checkpoint_in(folder: Path) -> "StageOutput":
    """Return the checkpoint in a folder; raises ThroughlineError if it holds none, or a damaged one."""
    from pipelines.core.manifest import MANIFEST_NAME
    from pipelines.runner.outputs import StageOutput

    checkpoint = StageOutput.load(folder / MANIFEST_NAME)
    if checkpoint.manifest.stage != _STAGE:
        raise ThroughlineError(f"{folder}: an output of {checkpoint.manifest.stage}, expected one of {_STAGE}")
    return _verified(checkpoint)


def strategy_of(checkpoint: "StageOutput") -> "Strategy":
    """Return the strategy that a checkpoint was trained with."""
    from training.models.saved_model import read_conditioning

    return read_conditioning(checkpoint).strategy


def _verified(checkpoint: "StageOutput") -> "StageOutput":
    """Fetch a checkpoint's files and compare their sizes with the manifest."""
    from pipelines.core.manifest import damaged_files

    checkpoint.fetch()
    problems = damaged_files(checkpoint.folder, checkpoint.manifest, read_bytes=False)
    if problems:
        raise ThroughlineError(problems[0])
    return checkpoint
