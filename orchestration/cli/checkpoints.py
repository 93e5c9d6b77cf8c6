"""Finds the finished checkpoint that a person means: the newest of a strategy, or the one in a folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import MANIFEST_NAME, damaged_files
from pipelines.runner.outputs import StageOutput
from pipelines.storage.mirror import location_of, sync_manifests
from training.config import Strategy
from training.export.saved_model import read_conditioning

if TYPE_CHECKING:
    from orchestration.profiles.profile import Profile

_STAGE = "checkpoint"


def parse_strategy(name: str) -> Strategy:
    """Return the strategy called `name`; raises ThroughlineError that lists the known ones."""
    try:
        return Strategy(name)
    except ValueError:
        known = ", ".join(strategy.value for strategy in Strategy)
        raise ThroughlineError(f"no strategy {name!r}; known: {known}") from None


def newest_checkpoint(profile: "Profile", strategy: Strategy, profile_argument: str | None = None) -> StageOutput:
    """Return the checkpoint of `strategy` that finished last under the profile's home, trained with its encoder.

    Raises ThroughlineError that says how to make one where there is none; `profile_argument` is how the user named the
    profile.
    """
    found = []
    root = profile.open_output_root()
    sync_manifests(root, _STAGE)
    for path in (root / _STAGE).glob(f"*/{MANIFEST_NAME}"):
        checkpoint = StageOutput.load(path)
        made_with = read_conditioning(checkpoint) if checkpoint.manifest.partition == strategy.value else None
        if made_with is None or made_with.text_encoder_id != profile.text_encoder.id:
            continue
        environment = checkpoint.manifest.environment
        found.append((environment.ended_at if environment else "", checkpoint.data_version, checkpoint))
    if not found:
        raise ThroughlineError(
            f"no finished checkpoint of {strategy.value} in {location_of(root)}; make one with "
            f"`throughline run --profile {profile_argument or profile.name} --select +checkpoint`"
        )
    return _whole(max(found)[2])


def checkpoint_in(folder: Path) -> StageOutput:
    """Return the checkpoint in a folder; raises ThroughlineError where it is none, or is damaged."""
    checkpoint = StageOutput.load(folder / MANIFEST_NAME)
    if checkpoint.manifest.stage != _STAGE:
        raise ThroughlineError(f"{folder}: an output of {checkpoint.manifest.stage}, expected one of {_STAGE}")
    return _whole(checkpoint)


def strategy_of(checkpoint: StageOutput) -> Strategy:
    """Return the strategy that a checkpoint was trained with."""
    return read_conditioning(checkpoint).strategy


def _whole(checkpoint: StageOutput) -> StageOutput:
    checkpoint.fetch()
    problems = damaged_files(checkpoint.folder, checkpoint.manifest, read_bytes=False)
    if problems:
        raise ThroughlineError(problems[0])
    return checkpoint
