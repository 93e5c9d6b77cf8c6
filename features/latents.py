"""Stage `latents`: the autoencoder's posterior for every image of a part.

Input `shards`; output one ``latents-NNNNN.safetensors`` per tar, in its order. Mean and std are stored unscaled;
training draws latents from them and scales them.
"""

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.config import LatentsConfig
from features.cost import latents_cost
from features.inspection import FEATURE_ROWS, check_finite
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import Conservation
from pipelines.core.progress import Progress
from pipelines.runner.checks import Check
from pipelines.runner.outputs import StageOutput
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun

if TYPE_CHECKING:
    import numpy as np

    from features.autoencoder import Autoencoder
    from pipelines.shards.reader import Sample


def produce(run: StageRun[LatentsConfig]) -> StageResult:
    """Encode the images of every shard that has no latents yet."""
    from features.shard_units import shard_units

    shards = run.input("shards")
    units = shard_units(shards)
    pending = [name for name in units if not run.is_finished(name)]
    measurements: dict[str, Any] = {}
    if pending:
        autoencoder = _load_autoencoder(run.config)
        started = time.monotonic()
        num_done = sum(unit.rows[0] for unit in run.finished_units() if unit.rows)
        total = sum(shards.manifest.file(path.name).num_rows or 0 for path in units.values())
        with run.progress(total or None, "images", initial=num_done) as progress:
            for name in pending:
                _encode_shard(run, autoencoder, shards, units[name], name, progress)
        seconds = time.monotonic() - started
        count = progress.done - num_done
        measurements = {"seconds": round(seconds, 3), "images_per_second": round(count / seconds, 3)}
    return StageResult(
        summary=_summary(run),
        measurements=measurements,
        conservation=None if units else Conservation(rows_in=0, rows_out=0),
    )


def _load_autoencoder(config: LatentsConfig) -> "Autoencoder":
    import torch

    from features.autoencoder import Autoencoder

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    autoencoder = Autoencoder.load(
        config.autoencoder, subfolder=config.subfolder, dtype=config.dtype, device=config.device
    )
    if config.image_px % autoencoder.downscale:
        raise ThroughlineError(
            f"images of {config.image_px} px are not divisible by the autoencoder's factor {autoencoder.downscale}"
        )
    return autoencoder


def _encode_shard(
    run: StageRun[LatentsConfig], autoencoder: "Autoencoder", shards: StageOutput, path: Path, name: str,
    progress: Progress,
) -> None:  # fmt: skip
    from features.latent_format import LatentWriter, latent_metadata
    from features.shard_units import open_shard

    config = run.config
    scratch_path = run.scratch / f"{name}.safetensors"
    side = config.image_px // autoencoder.downscale
    shape = (autoencoder.latent_channels, side, side)
    metadata = latent_metadata(config.autoencoder, autoencoder)
    with open_shard(shards, path) as shard:
        writer = LatentWriter(scratch_path, shard.keys, shape, config.storage_dtype, metadata)
        for start in range(0, len(shard), config.batch_size):
            batch = shard[start : start + config.batch_size]
            writer.write(start, *autoencoder.encode(_pixels(batch, config.image_px)))
            progress.advance(len(batch))
    writer.close()
    with run.unit(name) as unit:
        unit.adopt(scratch_path, f"latents-{name}.safetensors", num_rows=len(shard))
        unit.account(rows_in=len(shard), rows_out=len(shard))
        unit.notes.update(
            shape=list(shape), scaling_factor=autoencoder.scaling_factor, shift_factor=autoencoder.shift_factor
        )


def _pixels(samples: Sequence["Sample"], image_px: int) -> "np.ndarray":
    """Return uint8 (B, image_px, image_px, 3)."""
    import numpy as np
    from PIL import Image

    pixels = np.empty((len(samples), image_px, image_px, 3), dtype=np.uint8)
    for row, sample in enumerate(samples):
        try:
            image = Image.open(io.BytesIO(sample.image_bytes)).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise ThroughlineError(f"sample {sample.sample_key}: its image cannot be decoded ({error})") from error
        if image.size != (image_px, image_px):
            raise ThroughlineError(
                f"sample {sample.sample_key}: image of {image.width} x {image.height} px, expected {image_px} square; "
                "set image_px of latents to that of images"
            )
        pixels[row] = np.asarray(image)
    return pixels


def _summary(run: StageRun[LatentsConfig]) -> dict[str, Any]:
    units = run.finished_units()
    notes: dict[str, Any] = units[0].notes if units else {}
    return {"num_images": sum(unit.rows[1] for unit in units if unit.rows), **notes}


STAGE = Stage(
    name="latents",
    code_version="1",
    config_type=LatentsConfig,
    produce=produce,
    description="The autoencoder's posterior of every image, unscaled.",
    rows=FEATURE_ROWS,
    checks=(Check(name="finite", description="No NaN or infinity in the latents.", function=check_finite),),
    preview=None,
    funnel_label=None,
    cost=latents_cost,
)
