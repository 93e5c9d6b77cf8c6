"""Calibration: a short run of the real code that measures how fast one core filters, decodes and writes shards.

It works on synthetic data in a temporary folder. Filtering runs in fresh processes at two sizes, which gives memory a
base and a slope; both sizes fill the URL hash table to the same load as a part of LAION-400M.
"""

import io
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from orchestration.cost.assumptions import Assumptions
from orchestration.cost.inputs import Measured
from orchestration.profiles.profile import Profile
from pipelines.core.config import identity_of
from pipelines.core.digest import digest_json
from pipelines.core.errors import ThroughlineError

_FILTERED_ROWS = (12_900_000 // 64, 12_900_000 // 4)
_GROUP_ROWS = 65_536
_NUM_HOSTS = 5000
_DECODE_SECONDS = 3.0
_NUM_JPEGS = 16
_SHARD_SAMPLES = 8000
_VOCABULARY = (
    "a", "red", "cat", "on", "wooden", "table", "with", "flowers", "vintage", "photo", "of", "woman",
    "wearing", "blue", "dress", "for", "sale", "art", "print",
)  # fmt: skip


def calibrate(profile: Profile, assumptions: Assumptions) -> dict[str, Measured]:
    """Return rates by assumption, for the profile's rules and image size.

    Takes about 30 s of one core and temporarily 700 MB of disk.
    """
    with tempfile.TemporaryDirectory(prefix="throughline-calibration-") as name:
        folder = Path(name)
        rates = _filtering(profile, folder) | _decoding(profile, assumptions) | _writing(profile, folder)
    what = f"calibration of {datetime.now(UTC):%Y-%m-%d} on {platform.node()}"
    return {name: Measured(value, what) for name, value in rates.items()}


def save_calibration(measured: Mapping[str, Measured], profile: Profile) -> Path:
    """Write a calibration under the profile's home, where later estimates find it; return its path."""
    from pipelines.core.atomic import write_json

    record = {
        "host": platform.node(),
        "cores": os.cpu_count(),
        "of": _subject(profile),
        "measured": {name: {"value": item.value, "what": item.what} for name, item in measured.items()},
    }
    path = _path(profile)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return path


def load_calibration(profile: Profile) -> dict[str, Measured]:
    """Return the saved calibration; empty unless it was made on this machine with the same filters and image size.

    Raises ThroughlineError where its file is corrupt.
    """
    import json

    path = _path(profile)
    try:
        record = json.loads(path.read_bytes())
        matches = (record["host"], record["cores"], record["of"]) == (
            platform.node(),
            os.cpu_count(),
            _subject(profile),
        )
        return {name: Measured(**item) for name, item in record["measured"].items()} if matches else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ThroughlineError(f"{path}: not a readable calibration ({error}); delete it") from error


def _path(profile: Profile) -> Path:
    return Path(profile.home) / "cache" / "calibration.json"


def _subject(profile: Profile) -> str:
    return digest_json([identity_of(profile.laion_subset), identity_of(profile.images.transform)])


# Filtering


def _filtering(profile: Profile, folder: Path) -> dict[str, float]:
    from pipelines.cluster.config import WorkersConfig
    from pipelines.laion import index as laion_index
    from pipelines.laion.sources import scan_index

    for number, rows in enumerate(_FILTERED_ROWS):
        _write_metadata(folder / "metadata" / f"{number}.parquet", rows, seed=number)
    config = scan_index(folder / "metadata", folder / "digests.json")
    index = laion_index.STAGE.run(config, {}, folder)
    here = {"source": (), "digest_cache": None, "workers": WorkersConfig()}
    rules = profile.laion_subset.model_copy(update=here).model_dump()
    small, large = (
        _in_fresh_process(_filter, str(laion_index.entry_of(index, part).address), rules, str(folder), part)
        for part in ("0", "1")
    )
    few = _in_fresh_process(_select, [small["manifest"]], str(folder))
    many = _in_fresh_process(_select, [small["manifest"], large["manifest"]], str(folder))
    more_rows = _FILTERED_ROWS[1] - _FILTERED_ROWS[0]
    slope = max(0.0, (large["memory_bytes"] - small["memory_bytes"]) / more_rows)
    return {
        # Differences cancel a stage's start-up time, which is the same for both sizes.
        "filter_rows_per_second": more_rows / max(large["seconds"] - small["seconds"], 1e-3),
        "filter_bytes_per_row": slope,
        "filter_base_bytes": max(0.0, small["memory_bytes"] - slope * _FILTERED_ROWS[0]),
        "selection_rows_per_second": max(1.0, large["rows_out"] / max(many["seconds"] - few["seconds"], 1e-3)),
    }


def _write_metadata(path: Path, num_rows: int, seed: int) -> None:
    """Write synthetic rows with LAION-400M's columns, sizes and labels, and the other columns that rules may read."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    texts = pa.array([" ".join(rng.choice(_VOCABULARY, rng.integers(3, 18))) for _ in range(20_000)])
    hosts = pa.array([f"https://cdn{number}.shop-{number % 997}.example.com/uploads" for number in range(_NUM_HOSTS)])
    writer: pq.ParquetWriter | None = None
    for start in range(0, num_rows, _GROUP_ROWS):
        count = min(_GROUP_ROWS, num_rows - start)
        ids = rng.integers(0, 2**63, count)
        names = pc.cast(pa.array(ids), pa.string())
        width = np.clip(rng.lognormal(5.6, 0.7, count), 20, 6000).astype(np.int32)
        share = rng.random(count)
        table = pa.table(
            {
                "SAMPLE_ID": pa.array(ids),
                "URL": pc.binary_join_element_wise(hosts.take(pa.array(ids % _NUM_HOSTS)), names, "image.jpg", "/"),
                "TEXT": pc.binary_join_element_wise(texts.take(pa.array(ids % len(texts))), names, " "),
                "WIDTH": pa.array(width),
                "HEIGHT": pa.array(np.clip(width * np.exp(rng.normal(0, 0.3, count)), 20, 6000).astype(np.int32)),
                "LICENSE": pa.array(["?"] * count),
                "NSFW": pa.array(rng.choice(["UNLIKELY", "UNSURE", "NSFW"], count, p=[0.94, 0.04, 0.02])),
                "similarity": pa.array(0.3 + rng.gamma(2, 0.02, count)),
                "clip_l14_similarity_score": pa.array(0.2 + 0.2 * share),
                "aesthetic_score": pa.array(3 + 4 * share),
                "pwatermark": pa.array(share),
                "punsafe": pa.array(share[::-1]),
                "LANGUAGE": pa.array(["en"] * count),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema, compression="snappy")
        writer.write_table(table, row_group_size=_GROUP_ROWS)
    assert writer is not None
    writer.close()


def _in_fresh_process(work: Any, *arguments: Any) -> Any:
    """Return the result of a function called in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _filter(entry_path: str, rules: dict[str, Any], out: str, part: str) -> dict[str, Any]:
    from pipelines.laion import subset as laion_subset
    from pipelines.laion.config import LaionSubsetConfig
    from pipelines.runner.outputs import StageOutput

    _use_one_core_silently()
    entry = StageOutput.load(Path(entry_path))
    config = LaionSubsetConfig.model_validate(rules)
    started = time.monotonic()
    output = laion_subset.STAGE.run(config, {"index": [entry]}, Path(out), part)
    seconds = time.monotonic() - started
    kept = output.manifest.summary["num_kept"]
    return {
        "seconds": seconds, "rows_out": kept, "memory_bytes": _peak_bytes(), "manifest": str(output.manifest_path),
    }  # fmt: skip


def _select(manifests: Sequence[str], out: str) -> dict[str, float]:
    from pipelines.laion import selection as laion_selection
    from pipelines.laion.config import LaionSelectionConfig
    from pipelines.runner.outputs import StageOutput

    _use_one_core_silently()
    subsets = [StageOutput.load(Path(path)) for path in manifests]
    started = time.monotonic()
    laion_selection.STAGE.run(LaionSelectionConfig(), {"subset": subsets}, Path(out))
    return {"seconds": time.monotonic() - started}


def _use_one_core_silently() -> None:
    import pyarrow as pa

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    sys.stderr = io.StringIO()  # the stage's progress lines


def _peak_bytes() -> int:
    """Return the peak memory of this process. In a spawned process getrusage includes the parent's."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# Images and shards


def _jpegs(width: int, height: int) -> list[bytes]:
    """Return JPEGs of smooth noise with grain, about as expensive to decode as photographs of that size."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(_NUM_JPEGS):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = rng.normal(0, 4, smooth.shape[:2])[..., None]
        buffer = io.BytesIO()
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        jpegs.append(buffer.getvalue())
    return jpegs


def _decoding(profile: Profile, assumptions: Assumptions) -> dict[str, float]:
    from pipelines.download.decode import decode, prepare_to_decode
    from pipelines.download.status import FetchStatus

    width, height = assumptions.source_width_px, assumptions.source_height_px
    jpegs = _jpegs(width, height)
    prepare_to_decode()
    outcome = decode(jpegs[0], profile.images.transform)  # the first call loads Pillow's plug-ins
    if outcome.status is not FetchStatus.OK:
        raise ThroughlineError(
            f"--calibrate decodes images of {width}x{height} px, which images.transform rejects ({outcome.status}); "
            "set --assume source_width_px=... and source_height_px=..."
        )
    done, started = 0, time.monotonic()
    while (seconds := time.monotonic() - started) < _DECODE_SECONDS:
        decode(jpegs[done % len(jpegs)], profile.images.transform)
        done += 1
    return {"decode_images_per_second": done / seconds}


def _writing(profile: Profile, folder: Path) -> dict[str, float]:
    from pipelines.core.digest import HashingWriter
    from pipelines.shards.format import ShardWriter

    side = profile.images.transform.size_px
    jpegs = _jpegs(side, side)
    record = {
        "url": "https://cdn.example.com/uploads/2019/01/some-long-name-of-a-picture.jpg",
        "alt_text": "a vintage photo of a red cat on a wooden table", "format": "jpeg", "width_px": 800,
        "height_px": 600, "source_sha256": "0" * 64, "source_num_bytes": 180_000, "perceptual_hash": "0" * 16,
        "prompt_version": profile.captions.prompt_version, "part": "00000",
    }  # fmt: skip
    caption = "A dense caption, with colours, objects and their places. " * 12
    path = folder / "shard.tar"
    started = time.monotonic()
    with path.open("wb") as stream:
        writer = ShardWriter(HashingWriter(stream), path.name)
        for number in range(_SHARD_SAMPLES):
            key = f"{number:032x}"
            writer.add(key, jpegs[number % len(jpegs)], caption, {**record, "sample_key": key, "caption": caption})
        writer.finish().to_bytes()
        stream.flush()
        os.fsync(stream.fileno())
    return {"shard_samples_per_second": _SHARD_SAMPLES / (time.monotonic() - started)}
