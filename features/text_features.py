"""Stage `text_features`: hidden states of the frozen text encoder for every caption of a part.

Input `shards`; output one ``text_features-NNNNN.safetensors`` per tar, in its order. The stage is optional: training
encodes captions itself where there is no cache.
"""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.config import TextFeaturesConfig
from features.cost import text_features_cost
from features.inspection import FEATURE_ROWS, check_finite
from pipelines.core.manifest import Conservation
from pipelines.core.progress import Progress
from pipelines.runner.checks import Check
from pipelines.runner.outputs import StageOutput
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun

if TYPE_CHECKING:
    from features.text_encoder import TextEncoder


def produce(run: StageRun[TextFeaturesConfig]) -> StageResult:
    """Encode the captions of every shard that has no features yet."""
    from features.shard_units import shard_units

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise forks of a used tokenizer warn
    shards = run.input("shards")
    units = shard_units(shards)
    pending = [name for name in units if not run.is_finished(name)]
    measurements: dict[str, Any] = {}
    if pending:
        encoder = _load_encoder(run.config)
        started = time.monotonic()
        num_done = sum(unit.rows[0] for unit in run.finished_units() if unit.rows)
        total = sum(shards.manifest.file(path.name).num_rows or 0 for path in units.values())
        with run.progress(total or None, "captions", initial=num_done) as progress:
            for name in pending:
                _encode_shard(run, encoder, shards, units[name], name, progress)
        seconds = time.monotonic() - started
        count = progress.done - num_done
        measurements = {"seconds": round(seconds, 3), "captions_per_second": round(count / seconds, 3)}
    return StageResult(
        summary=_summary(run),
        measurements=measurements,
        conservation=None if units else Conservation(rows_in=0, rows_out=0),
    )


def _load_encoder(config: TextFeaturesConfig) -> "TextEncoder":
    import torch

    from features.text_encoder import TextEncoder

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    return TextEncoder.load(
        config.text_encoder,
        layers=config.layers,
        template_version=config.template_version,
        dtype=config.dtype,
        device=config.device,
        max_tokens=config.max_tokens,
    )


def _encode_shard(
    run: StageRun[TextFeaturesConfig], encoder: "TextEncoder", shards: StageOutput, path: Path, name: str,
    progress: Progress,
) -> None:  # fmt: skip
    from features.feature_format import TextFeatureWriter, feature_metadata
    from features.shard_units import open_shard

    config = run.config
    with open_shard(shards, path) as shard:
        sample_keys = shard.keys
        captions = [sample.caption for sample in shard]
    lengths = [len(ids) for ids in encoder.tokenise(captions)]
    scratch_path = run.scratch / f"{name}.safetensors"
    metadata = feature_metadata(config.text_encoder, config.template_version, encoder.layers)
    writer = TextFeatureWriter(scratch_path, sample_keys, lengths, encoder.width, metadata)
    num_truncated = 0
    for index, text in encoder.encode_by_length(captions, config.max_batch_tokens):
        writer.write(index, text)
        num_truncated += text.was_truncated
        progress.advance()
    writer.close()
    with run.unit(name) as unit:
        unit.adopt(scratch_path, f"text_features-{name}.safetensors", num_rows=len(sample_keys))
        unit.account(rows_in=len(sample_keys), rows_out=len(sample_keys))
        unit.notes.update(
            num_tokens=sum(lengths), num_truncated=num_truncated, layers=list(encoder.layers), width=encoder.width
        )


def _summary(run: StageRun[TextFeaturesConfig]) -> dict[str, Any]:
    units = run.finished_units()
    num_texts = sum(unit.rows[1] for unit in units if unit.rows)
    num_tokens = sum(unit.notes["num_tokens"] for unit in units)
    return {
        "num_texts": num_texts,
        "num_tokens": num_tokens,
        "mean_tokens": round(num_tokens / num_texts, 3) if num_texts else 0.0,
        "num_truncated": sum(unit.notes["num_truncated"] for unit in units),
        "num_layers": len(units[0].notes["layers"]) if units else 0,
        "width": units[0].notes["width"] if units else 0,
    }


STAGE = Stage(
    name="text_features",
    code_version="1",
    config_type=TextFeaturesConfig,
    produce=produce,
    description="The frozen text encoder's hidden states of every caption, all layers, unpadded.",
    rows=FEATURE_ROWS,
    checks=(Check(name="finite", description="No NaN or infinity in the features.", function=check_finite),),
    preview=None,
    funnel_label=None,
    cost=text_features_cost,
)
