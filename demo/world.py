"""Builds the demo world: images, the pages of a small web that serves them, LAION metadata, and the ground truth.

A world is a folder that is created atomically; the same parameters give the same bytes. `demo.web` serves it.
"""

import argparse
import fcntl
import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.core.atomic import sync_folder, write_json
from pipelines.core.digest import digest_json, file_sha256
from pipelines.core.errors import ThroughlineError

HOST = "127.0.0.1"
DEFAULT_PORT = 8765
"""Part of every URL, and sample keys hash the URL: another port is another world."""
CODE_VERSION = "1"
"""Raise it whenever the code gives a world other bytes; worlds of other versions are rebuilt."""
_SOURCE_DIGESTS = ("a6d05484e5a0f3a5", "4b57873ccce0ffa6")
"""Digests of the source code that earlier worlds record as their code version; they have the bytes of version 1."""
WORLD_NAME = "world.json"
PAGES_NAME = "pages.json"
PACK_NAME = "bodies.pack"
TRUTH_NAME = "truth.parquet"
LAION_FOLDER = "laion"

LAION_SCHEMA = pa.schema(
    {
        "SAMPLE_ID": pa.float64(),
        "URL": pa.string(),
        "TEXT": pa.string(),
        "HEIGHT": pa.int64(),
        "WIDTH": pa.int64(),
        "LICENSE": pa.string(),
        "NSFW": pa.string(),
        "similarity": pa.float64(),
    }
)
"""LAION-400M's columns; it stores SAMPLE_ID as a float, which JSON and spreadsheets show as 1.234e+12."""

TRUTH_SCHEMA = pa.schema(
    {
        "url": pa.string(),
        "part": pa.string(),
        "row": pa.int64(),
        "flaw": pa.string(),
        "behaviour": pa.string(),
        "outcome": pa.string(),
        "copy_of": pa.string(),
        "caption": pa.string(),
        "scene": pa.string(),
    }
)
"""`flaw`: the filter reason for which the row is dropped, or null. `behaviour`, `outcome`: see `demo.web_pages`.
`copy_of`: the URL whose bytes this one repeats."""


@dataclass(frozen=True, kw_only=True)
class World:
    """A built world."""

    folder: Path
    id: str
    """Digest of parameters and files."""
    parameters: dict[str, Any]
    counts: dict[str, Any]

    @property
    def laion_dir(self) -> Path:
        """The folder of metadata files, ``part-00000.parquet`` and so on."""
        return self.folder / LAION_FOLDER

    @property
    def parts(self) -> list[Path]:
        return sorted(self.laion_dir.glob("part-*.parquet"))

    @property
    def port(self) -> int:
        return self.parameters["port"]

    def truth(self) -> list[dict[str, Any]]:
        """Return one record of `TRUTH_SCHEMA` per metadata row, in the order of parts and rows."""
        return pq.read_table(self.folder / TRUTH_NAME).to_pylist()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Return the world in `folder`; raises ThroughlineError if there is none."""
        try:
            record = json.loads((folder / WORLD_NAME).read_text())
            return cls(folder=folder, id=record["id"], parameters=record["parameters"], counts=record["counts"])
        except (OSError, ValueError, KeyError) as error:
            raise ThroughlineError(
                f"{folder}: no demo world here ({type(error).__name__}); run `python -m demo.world --out {folder}`"
            ) from error


def ensure_world(
    out_dir: Path, *, num_images: int = 840, num_parts: int = 2, seed: int = 0, port: int = DEFAULT_PORT
) -> World:
    """Return the world of these parameters in `out_dir`; build it if it is missing, different or damaged.

    `num_images` is the number of metadata rows in all parts. Two concurrent processes build it once. Raises
    ThroughlineError if `out_dir` contains something other than a world.
    """
    out_dir = Path(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    rows_per_part = num_images // num_parts
    with out_dir.with_name(f".{out_dir.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (world := _intact(out_dir, _parameters(seed, num_parts, rows_per_part, port))) is not None:
            return world
        return build_world(out_dir, seed=seed, num_parts=num_parts, rows_per_part=rows_per_part, port=port)


def build_world(
    out_dir: Path, *, seed: int = 0, num_parts: int = 2, rows_per_part: int = 420, port: int = DEFAULT_PORT
) -> World:
    """Build the world of these parameters at `out_dir`, replacing an existing one; 840 rows take about 10 s.

    Raises ThroughlineError if `out_dir` contains something other than a world or can't be written, or if the numbers
    are too small.
    """
    out_dir = Path(out_dir)
    if num_parts < 1 or rows_per_part < 10:
        raise ThroughlineError(
            f"demo world: {num_parts} parts of {rows_per_part} rows, expected at least 1 part of 10 rows"
        )
    if out_dir.exists() and any(out_dir.iterdir()) and not (out_dir / WORLD_NAME).exists():
        raise ThroughlineError(f"{out_dir}: not empty, and contains no demo world; name another folder")
    staging = out_dir.with_name(f".{out_dir.name}.tmp")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / LAION_FOLDER).mkdir(parents=True)
        truth = _write_files(staging, seed, num_parts, rows_per_part, port)
        return _publish(staging, out_dir, _parameters(seed, num_parts, rows_per_part, port), truth)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise ThroughlineError(
            f"{out_dir}: the demo world can't be written ({error.strerror or error}); it takes about 20 MB, free "
            "some space or name another folder"
        ) from error


def _write_files(staging: Path, seed: int, num_parts: int, rows_per_part: int, port: int) -> list[dict[str, Any]]:
    """Write everything but the world's record; return the ground truth of all rows."""
    from demo.world_rows import PartBuilder, Site  # imports the renderer, which serving a world does not need

    with (staging / PACK_NAME).open("wb") as pack:
        site = Site(pack=pack, origin=f"http://{HOST}:{port}")
        parts = [PartBuilder(site, seed, f"{number:05d}", rows_per_part).build() for number in range(num_parts)]
    write_json(staging / PAGES_NAME, {path: asdict(page) for path, page in site.pages.items()})
    truth: list[dict[str, Any]] = []
    for number, (laion_rows, truth_rows) in enumerate(parts):
        path = staging / LAION_FOLDER / f"part-{number:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(laion_rows, LAION_SCHEMA), path)
        truth += truth_rows
    pq.write_table(pa.Table.from_pylist(truth, TRUTH_SCHEMA), staging / TRUTH_NAME)
    return truth


def _parameters(seed: int, num_parts: int, rows_per_part: int, port: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "num_parts": num_parts,
        "rows_per_part": rows_per_part,
        "port": port,
        "code": CODE_VERSION,
    }


def _publish(staging: Path, out_dir: Path, parameters: dict[str, Any], truth: list[dict[str, Any]]) -> World:
    paths = sorted(path for path in staging.rglob("*") if path.is_file())
    files = {str(path.relative_to(staging)): file_sha256(path) for path in paths}
    passed = [row for row in truth if row["flaw"] is None]
    record = {
        "id": digest_json({"parameters": parameters, "files": files}),
        "parameters": parameters,
        "files": files,
        "counts": {
            "rows": len(truth),
            "flaws": dict(sorted(Counter(row["flaw"] for row in truth if row["flaw"]).items())),
            "behaviours": dict(sorted(Counter(row["behaviour"] for row in passed).items())),
            "outcomes": dict(sorted(Counter(row["outcome"] for row in passed).items())),
        },
    }
    write_json(staging / WORLD_NAME, record)
    retired = out_dir.with_name(f".{out_dir.name}.old")
    shutil.rmtree(retired, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(retired)
    staging.rename(out_dir)
    sync_folder(out_dir.parent)
    shutil.rmtree(retired, ignore_errors=True)
    return World.open(out_dir)


def _intact(folder: Path, parameters: dict[str, Any]) -> World | None:
    """Return the world in `folder` if its parameters equal these and every file has its digest."""
    try:
        record = json.loads((folder / WORLD_NAME).read_text())
        found = record["parameters"]
        if found["code"] in _SOURCE_DIGESTS:
            found = found | {"code": "1"}
        if found != parameters:
            return None
        if any(file_sha256(folder / name) != digest for name, digest in record["files"].items()):
            return None
    except (OSError, ValueError, KeyError):
        return None
    return World.open(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=840, help="metadata rows over all parts")
    parser.add_argument("--num-parts", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    options = parser.parse_args()
    started = time.monotonic()
    try:
        built = ensure_world(
            options.out,
            num_images=options.num_images,
            num_parts=options.num_parts,
            seed=options.seed,
            port=options.port,
        )
    except ThroughlineError as error:
        sys.exit(str(error))
    print(f"{built.folder}: world {built.id} in {time.monotonic() - started:.1f} s")
    print(json.dumps(built.counts, indent=1))
