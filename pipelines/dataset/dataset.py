"""Stage ``dataset``: combines all parts into one table of samples, the only input that training depends on.

The table lists each sample, its shard and its split; the samples themselves stay in the shards.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.cluster.units import ray_tasks
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import DROPPED_NAME
from pipelines.dataset.checks import DUPLICATE_KEYS
from pipelines.dataset.config import DatasetConfig
from pipelines.dataset.feature_keys import feature_keys
from pipelines.laion.block_lists import read_keys
from pipelines.laion.index import part_names
from pipelines.runner.outputs import StageOutput
from pipelines.runner.rows import RowTable
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun, Unit
from pipelines.shards.format import ShardIndex
from pipelines.shards.reader import Shard

SAMPLES_FILE = "samples.parquet"
TRAIN, VALIDATION = "train", "validation"
WITHDRAWN = "withdrawn"
_ROW_GROUP_ROWS = 65_536
_HASH_COLUMNS = ("perceptual_hash", "source_sha256", "source_pixels")


def split_of(sample_key: str, config: DatasetConfig) -> str:
    """Return ``train`` or ``validation``: a function of the key, so that a sample never changes its split."""
    digest = hashlib.blake2b(bytes.fromhex(sample_key), digest_size=8, salt=_salt(config.validation_salt)).digest()
    held_out = int.from_bytes(digest, "little") < config.validation_share * 2**64
    return VALIDATION if held_out else TRAIN


def _salt(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=hashlib.blake2b.SALT_SIZE).digest()


def produce(run: StageRun[DatasetConfig]) -> StageResult:
    parts = _by_part(run.inputs.get("shards", ()), "shards")
    if not parts:
        raise ThroughlineError("dataset: no shards among its inputs; materialize at least one part first")
    for index in run.inputs.get("index", ()):
        _check_parts(index, parts)
    features = {name: _by_part(run.inputs[name], name) for name in ("latents", "text_features") if run.inputs.get(name)}
    for name, outputs in features.items():
        missing = [part for part in parts if part not in outputs]
        if missing:
            raise ThroughlineError(f"dataset: {name} for part {', '.join(missing)} not among its inputs; run it first")
    if not run.is_finished("samples"):
        _write_samples(run, parts, features)
    (unit,) = run.finished_units()
    return StageResult(
        summary={"num_parts": len(parts), "num_samples": unit.rows[1] if unit.rows else 0, **unit.notes["splits"]}
    )


def _check_parts(index: StageOutput, parts: Collection[str]) -> None:
    registered = part_names(index)
    differing = sorted(set(registered) ^ set(parts))
    if differing:
        raise ThroughlineError(
            f"dataset: shards of {len(parts)} parts, but the index registers {len(registered)}; they differ in "
            f"{differing[0]}; run all parts of the index"
        )


def _by_part(outputs: Sequence[StageOutput], name: str) -> dict[str, StageOutput]:
    """Return part -> output, sorted by part."""
    by_part: dict[str, StageOutput] = {}
    for output in sorted(outputs, key=lambda item: item.manifest.partition or ""):
        part = output.manifest.partition or ""
        if part in by_part:
            raise ThroughlineError(f"dataset: two outputs of {name} for part {part} among its inputs")
        by_part[part] = output
    return by_part


@dataclass
class _Samples:
    """Samples collected from all parts."""

    locations: dict[str, tuple[str, str, int]] = field(default_factory=dict)
    """Sample key -> (part, shard, index in the shard), of those that are kept."""
    hashes: dict[str, tuple[str, str, int]] = field(default_factory=dict)
    """Sample key -> (perceptual hash, source SHA-256, source pixels), if duplicates are to be dropped."""
    withdrawn: set[str] = field(default_factory=set)
    num_rows_in: int = 0


def _write_samples(
    run: StageRun[DatasetConfig], parts: dict[str, StageOutput], features: dict[str, dict[str, StageOutput]]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with run.unit("samples") as unit, run.progress(len(parts), "parts") as progress:
        samples = _Samples()
        withdrawn = read_keys(run.config.withdrawn)
        for part, shards in parts.items():
            features_of_part = {name: outputs[part] for name, outputs in features.items()}
            _collect_part(run.config, unit, samples, shards, features_of_part, withdrawn)
            progress.advance(samples=len(samples.locations))
        if _needs_hashes(run.config):
            _drop_duplicate_images(run, unit, samples)
        sample_keys = sorted(samples.locations)
        locations = [samples.locations[key] for key in sample_keys]
        splits = [split_of(key, run.config) for key in sample_keys]
        table = pa.table(
            {
                "sample_key": pa.array(sample_keys, pa.string()),
                "part": pa.array([part for part, _, _ in locations], pa.string()),
                "shard": pa.array([shard for _, shard, _ in locations], pa.string()),
                "index_in_shard": pa.array([index for _, _, index in locations], pa.int32()),
                "split": pa.array(splits, pa.string()),
            }
        )
        with unit.open(SAMPLES_FILE, num_rows=len(sample_keys)) as stream:
            pq.write_table(table, stream, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
        unit.account(rows_in=samples.num_rows_in, rows_out=len(sample_keys))
        unit.notes["splits"] = {f"num_{split}": splits.count(split) for split in (TRAIN, VALIDATION)}


def _needs_hashes(config: DatasetConfig) -> bool:
    return config.duplicate_images or config.near_duplicates is not None


def _collect_part(
    config: DatasetConfig,
    unit: Unit,
    samples: _Samples,
    shards: StageOutput,
    features: dict[str, StageOutput],
    withdrawn: Collection[str],
) -> None:
    """Add the samples of one part; drop those that are withdrawn, lack a feature, or are known from an earlier part."""
    part = shards.manifest.partition or ""
    for path in shards.files(".tar"):
        contents = _checked_contents(path, shards)
        keys = contents.keys
        available = {name: _feature_keys(output, name, path, keys) for name, output in features.items()}
        samples.num_rows_in += len(keys)
        for index, key in enumerate(keys):
            missing = next((name for name, present in available.items() if key not in present), None)
            if key in withdrawn:
                unit.drop(key, WITHDRAWN, f"{path.name} of part {part}")
                samples.withdrawn.add(key)
            elif missing:
                unit.drop(key, f"{missing}_missing", f"{path.name} of part {part}")
            elif key in samples.locations:
                first_part, first_shard, _ = samples.locations[key]
                unit.drop(
                    key, "duplicate_key", f"{path.name} of part {part}, first in {first_shard} of part {first_part}"
                )
            else:
                samples.locations[key] = (part, path.name, index)
        if _needs_hashes(config):
            samples.hashes |= zip(keys, _hashes(contents, path), strict=True)


def left_out_as_withdrawn(datasets: Iterable[StageOutput]) -> frozenset[str]:
    """Return the sample keys that datasets dropped as withdrawn."""
    import pyarrow.parquet as pq

    keys: set[str] = set()
    for output in datasets:
        conservation = output.manifest.conservation
        if conservation is not None and WITHDRAWN in conservation.dropped:
            rows = pq.read_table(output.path(DROPPED_NAME), filters=[("reason", "=", WITHDRAWN)])
            keys.update(rows["sample_key"].to_pylist())
    return frozenset(keys)


def _checked_contents(path: Path, shards: StageOutput) -> ShardIndex:
    with Shard(path) as shard:
        contents = shard.contents
    stated = shards.manifest.file(path.name).num_rows
    if len(contents.keys) != stated:
        raise ThroughlineError(
            f"{path}: {len(contents.keys)} samples, manifest says {stated}; re-run shards for part "
            f"{shards.manifest.partition}"
        )
    return contents


def _hashes(contents: ShardIndex, path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield (perceptual hash, source SHA-256, source pixels) of each sample of a shard."""
    missing = [name for name in _HASH_COLUMNS if name not in contents.columns]
    if missing:
        raise ThroughlineError(f"{path}: its index has no {', '.join(missing)}; re-run images and shards")
    return zip(*(contents.columns[name] for name in _HASH_COLUMNS), strict=True)


def _drop_duplicate_images(run: StageRun[DatasetConfig], unit: Unit, samples: _Samples) -> None:
    """Drop samples that duplicate another one; the detail of a drop is the key of the sample that wins.

    Withdrawn samples win over all others, so that a withdrawn image does not survive as its copy.
    """
    import numpy as np

    from pipelines.dataset.near_duplicates import winners

    config, hashes = run.config, samples.hashes
    candidates = [*samples.withdrawn, *samples.locations]
    best_first = sorted(candidates, key=lambda key: (key not in samples.withdrawn, -hashes[key][2], key))
    if config.duplicate_images:
        first: dict[str, str] = {}
        for key in best_first:
            winner = first.setdefault(hashes[key][1], key)
            if winner != key and samples.locations.pop(key, None) is not None:
                unit.drop(key, "duplicate_image", winner)
        best_first = list(first.values())
    if config.near_duplicates is not None:
        packed = np.array([int(hashes[key][0], 16) for key in best_first], dtype=np.uint64)
        with ray_tasks(run, config.workers) as tasks:
            winner_of = winners(packed, config.near_duplicates, tasks)
        for index, winner_index in enumerate(winner_of.tolist()):
            if winner_index != index and samples.locations.pop(best_first[index], None) is not None:
                unit.drop(best_first[index], "near_duplicate", best_first[winner_index])


def _feature_keys(output: StageOutput, name: str, shard: Path, keys_of_shard: Sequence[str]) -> set[str]:
    """Return the keys that have this feature; raises ThroughlineError for keys that are not in the shard."""
    path = output.path(f"{name}-{shard.stem.removeprefix('shard-')}.safetensors")
    keys = set(feature_keys(path))
    unknown = keys.difference(keys_of_shard)
    if unknown:
        raise ThroughlineError(
            f"{path}: {len(unknown)} sample keys that are not in {shard.name}, such as {min(unknown)}; "
            f"re-run {name} for part {output.manifest.partition}"
        )
    return keys


STAGE = Stage(
    name="dataset",
    code_version="2",
    config_type=DatasetConfig,
    produce=produce,
    description="The roll-up of all parts: the table of samples and their shards. Training depends on it alone.",
    rows=RowTable("samples", ("split", "part", "shard")),
    checks=(DUPLICATE_KEYS,),
    preview=None,
    funnel_label="Samples to train on",
    cost=None,
)
