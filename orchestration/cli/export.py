"""`throughline export`: a finished checkpoint as a folder that diffusers loads."""

from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.cli.checkpoints import checkpoint_in, newest_checkpoint, parse_strategy
from pipelines.core.errors import ThroughlineError

if TYPE_CHECKING:
    from orchestration.profiles.profile import Profile


def export(
    profile: "Profile",
    out: Path,
    *,
    strategy: str | None,
    checkpoint: Path | None,
    save_text_encoder: bool = True,
    profile_argument: str | None = None,
) -> Path:
    """Write the newest checkpoint of a strategy, or the one in a folder, to `out`; return it.

    Raises ThroughlineError for what the user can mend.
    """
    from training.export.export import export_pipeline

    if (strategy is None) == (checkpoint is None):
        raise ThroughlineError("name either a strategy with --strategy or a checkpoint's folder with --checkpoint")
    if checkpoint is not None:
        source = checkpoint_in(checkpoint)
    else:
        assert strategy is not None
        source = newest_checkpoint(profile, parse_strategy(strategy), profile_argument)
    samples = profile.resolved(profile.samples)
    return export_pipeline(
        source, samples.text_encoder, samples.autoencoder, samples.sampler, out, save_text_encoder=save_text_encoder
    )
