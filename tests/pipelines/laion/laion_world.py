"""Small LAION tables, captions and stage inputs for tests of the data stages."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.core.config import FrozenConfig, ModelRef
from pipelines.core.manifest import DROPPED_NAME
from pipelines.download import images
from pipelines.download.config import FetchConfig, ImagesConfig
from pipelines.download.tables import image_units
from pipelines.laion import index as laion_index
from pipelines.laion import subset as laion_subset
from pipelines.laion.config import EntryList, LaionSubsetConfig
from pipelines.laion.sources import scan_entry_list, scan_index
from pipelines.runner.outputs import StageOutput
from pipelines.runner.request import StageRequest, write_request
from pipelines.runner.units import StageResult, StageRun
from tests.pipelines.download.hostile_server import HostileServer
from tests.plain_stage import plain_stage

REPOSITORY = Path(__file__).resolve().parents[3]
LAION_400M = pa.schema(
    {
        "SAMPLE_ID": pa.int64(),
        "URL": pa.string(),
        "TEXT": pa.string(),
        "HEIGHT": pa.int64(),
        "WIDTH": pa.int64(),
        "LICENSE": pa.string(),
        "NSFW": pa.string(),
        "similarity": pa.float64(),
    }
)


def laion_row(url: str | None, text: str | None = "a red cat", **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "SAMPLE_ID": 1,
        "URL": url,
        "TEXT": text,
        "HEIGHT": 300,
        "WIDTH": 280,
        "LICENSE": "?",
        "NSFW": "UNLIKELY",
        "similarity": 0.33,
    }
    return row | changes


def write_laion(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema = LAION_400M, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema), path, **options)
    return path


def entry_list(path: Path, *lines: str) -> EntryList:
    path.write_text("\n".join(lines) + "\n")
    return scan_entry_list(path)


def run_index(source: Path, root: Path) -> StageOutput:
    return laion_index.STAGE.run(scan_index(source, root / "digests.json"), {}, root)


def run_subset(source: Path, root: Path, part: str | None = None, **rules: Any) -> StageOutput:
    """Index a folder and return the subset of a part, by default the first."""
    index = run_index(source, root)
    return subset_of(index, root, part or laion_index.part_names(index)[0], **rules)


def subset_of(index: StageOutput, root: Path, part: str, **rules: Any) -> StageOutput:
    inputs = {"index": [laion_index.entry_of(index, part)]}
    return laion_subset.STAGE.run(LaionSubsetConfig(**rules), inputs, root, part)


def images_config(server: HostileServer, **changes: Any) -> ImagesConfig:
    fetch = FetchConfig(
        read_seconds=10.0,
        total_seconds=20.0,
        retries=2,
        retry_timeouts=False,
        backoff_seconds=0.01,
        max_body_bytes=1_000_000,
        allowed_private_hosts=(server.host,),
    )
    return ImagesConfig(**{"fetch": fetch, "rows_per_shard": 8, "max_failure_share": 1.0, **changes})


def start_images(config: ImagesConfig, subset: StageOutput, folder: Path) -> "subprocess.Popen[bytes]":
    """Start the stage in a process that the test kills; the output root is `folder`/killed."""
    request = StageRequest(
        stage="images",
        partition="00000",
        config=config.model_dump(mode="json"),
        inputs={"subset": [str(subset.manifest_path)]},
        output_root=str(folder / "killed"),
    )
    write_request(folder / "request.json", request)
    command = [sys.executable, "-m", "pipelines.runner", "images", "--config", str(folder / "request.json")]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, start_new_session=True)


def run_images(server: HostileServer, subset: StageOutput, root: Path, **changes: Any) -> StageOutput:
    part = subset.manifest.partition
    return images.STAGE.run(images_config(server, **changes), {"subset": [subset]}, root, part)


class CaptionerConfig(FrozenConfig):
    """Stand-in for the captioning stage: writes its tables without a model."""

    captioner: ModelRef = ModelRef(id="test/captioner", revision="sha256:1")
    changes: dict[str, dict[str, str] | None] = {}  # noqa: RUF012 - a pydantic field
    """sample key -> fields to change in its caption row, or None to omit the row."""
    duplicate: str | None = None
    stranger: str | None = None


def _caption(run: StageRun[CaptionerConfig]) -> StageResult:
    config = run.config
    for image_unit in image_units(run.input("images")):
        keys = image_unit.read(["sample_key"])["sample_key"].to_pylist()
        rows = [
            {
                "sample_key": key,
                "caption": f"A caption, čaj ☕, of {key}.",
                "prompt_version": "dense-1",
                "finish_reason": "stop",
            }
            | (config.changes.get(key) or {})
            for key in reversed(keys)  # not in the images' order, so that a join by position fails
            if config.changes.get(key, {}) is not None
        ]
        rows += [rows[0] | {"sample_key": key} for key in (config.duplicate, config.stranger) if key]
        with run.unit(image_unit.name) as unit, unit.open(f"captions-{image_unit.name}.parquet") as stream:
            pq.write_table(pa.Table.from_pylist(rows), stream)
    return StageResult()


CAPTIONS = plain_stage(name="captions", code_version="1", config_type=CaptionerConfig, produce=_caption)


def run_captions(images_output: StageOutput, root: Path, **config: Any) -> StageOutput:
    part = images_output.manifest.partition
    return CAPTIONS.run(CaptionerConfig(**config), {"images": [images_output]}, root, part)


def kept_rows(output: StageOutput) -> list[dict[str, Any]]:
    """Return the rows that a subset kept."""
    return pq.read_table(output.path(laion_subset.ROWS_FILE)).to_pylist()


def drop_reasons(output: StageOutput) -> dict[int, str]:
    """Return source row -> why it was dropped."""
    if DROPPED_NAME not in {entry.path for entry in output.manifest.files}:
        return {}
    rows = pq.read_table(output.path(DROPPED_NAME)).to_pylist()
    return {int(row["detail"].removeprefix("row ")): row["reason"] for row in rows}
