"""Shards against plain webdataset and img2dataset: writing, and reading with decoding, all ways in turn in one run.

python -m tests.benchmarks.shards [--samples 1000] [--rounds 5] [--img2dataset PYTHON]

Rates are samples per second of CPU time, the kernel's included, so that a busy machine changes them little; give it one
core (``taskset -c 0``). All ways get the same pictures (256 px, JPEG quality 95) with the same captions and records:

- writing from encoded pictures: our writer with its digests and index, and without the digests; webdataset's TarWriter;
  img2dataset's WebDataset writer with its table, where `--img2dataset` names a Python that has it;
- writing from decoded pictures: the same, each after its own JPEG encoder (Pillow for us and webdataset, OpenCV for
  img2dataset) from pictures as its decoder leaves them (Pillow images, OpenCV arrays), with Pillow's encoder alone as
  the limit;
- reading with decoding: our shards in sequence and in the shuffled global order, webdataset in sequence, each with one
  decoder (Pillow, to RGB pixels), and that decoder alone on pictures in memory as the limit.
"""

import argparse
import io
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from pipelines.core.digest import HashingWriter
from pipelines.core.errors import ThroughlineError
from pipelines.dataset.order import Share
from pipelines.dataset.samples import ShardSamples
from pipelines.dataset.stream import ShardStream, decode_image
from pipelines.shards.format import SampleMembers, ShardWriter, index_path
from pipelines.shards.reader import Sample, read_shard
from tests.benchmarks.record import write_results

_SIZE_PX = 256
_QUALITY = 95
_SHARD_SAMPLES = 500

# Runs in the other Python: for each line on standard input it writes all samples once and prints its CPU seconds.
_IMG2DATASET = """
import json, sys, time
import numpy as np, pyarrow as pa, webdataset as wds
from pathlib import Path
from img2dataset.resizer import Resizer
from img2dataset.writer import WebDatasetSampleWriter
folder = Path(sys.argv[1])
samples = list(wds.WebDataset([str(p) for p in sorted(folder.glob("input-*.tar"))], shardshuffle=False))
records = [(s["__key__"], s["jpg"], s["txt"].decode(), json.loads(s["json"])) for s in samples]
pixels = np.load(folder / "pixels.npy")
kinds = {str: pa.string(), int: pa.int64(), float: pa.float64()}
schema = pa.schema([(name, kinds[type(value)]) for name, value in records[0][3].items()])
resizer = Resizer(256, "no", False, encode_quality=95)
import cv2
encode = lambda image: cv2.imencode(".jpg", image, params=resizer.encode_params)[1].tobytes()
print("ready", flush=True)
for line in sys.stdin:
    decoded = line.strip() == "decoded"
    start = time.process_time()
    writer = WebDatasetSampleWriter(0, str(folder / "img2dataset"), True, 5, schema, "jpg")
    for (key, image, caption, meta), picture in zip(records, pixels):
        writer.write(encode(picture) if decoded else image, key, caption, dict(meta))
    writer.close()
    print(time.process_time() - start, flush=True)
"""


def _pictures(count: int) -> np.ndarray:
    """Return uint8 (count, 256, 256, 3): smooth noise with grain, about as many JPEG bytes as photographs have."""
    rng = np.random.default_rng(0)
    pictures = np.empty((count, _SIZE_PX, _SIZE_PX, 3), dtype=np.uint8)
    for row in range(count):
        small = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((_SIZE_PX, _SIZE_PX), Image.Resampling.BICUBIC), dtype=np.float32)
        pictures[row] = np.clip(smooth + rng.normal(0, 4, smooth.shape[:2])[..., None], 0, 255)
    return pictures


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _record(index: int, caption: str) -> dict[str, Any]:
    return {
        "sample_key": f"{index:032x}",
        "url": f"https://example.org/pictures/{index}.jpg",
        "alt_text": f"picture {index}",
        "caption": caption,
        "format": "jpeg",
        "width_px": 1024,
        "height_px": 768,
        "source_sha256": f"{index:064x}",
        "source_num_bytes": 180_000,
        "perceptual_hash": f"{index:016x}",
        "prompt_version": "dense-1",
        "part": "00000",
    }


class _World:
    """The samples, and every way to write and to read them."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        pixels = _pictures(count)
        self.pictures = [Image.fromarray(picture) for picture in pixels]
        self.images = [_jpeg(picture) for picture in self.pictures]
        captions = [
            f"A dense caption of picture {index}, {'with its colours and objects, ' * 8}." for index in range(count)
        ]
        self.records = [_record(index, caption) for index, caption in enumerate(captions)]
        self.shards = []
        for start in range(0, count, _SHARD_SAMPLES):
            self.shards.append(folder / f"input-{start // _SHARD_SAMPLES:05d}.tar")
            part = slice(start, start + _SHARD_SAMPLES)
            self._write_ours(self.shards[-1], self.images[part], self.records[part], digests=True)
        np.save(folder / "pixels.npy", pixels)

    def _write_ours(self, path: Path, images: Iterable[bytes], records: list[dict[str, Any]], *, digests: bool) -> None:
        with path.open("wb") as stream:
            writer = ShardWriter(HashingWriter(stream), path.name)
            for image, record in zip(images, records, strict=True):
                if digests:
                    writer.add(record["sample_key"], image, record["caption"], record)
                else:
                    text = record["caption"].encode()
                    members = ("jpg", image), ("json", json.dumps(record).encode()), ("txt", text)
                    writer.add_members(SampleMembers(record["sample_key"], members))
            index_path(path).write_bytes(writer.finish().to_bytes())

    def ours(self) -> None:
        self._write_ours(self.folder / "ours.tar", self.images, self.records, digests=True)

    def ours_without_digests(self) -> None:
        self._write_ours(self.folder / "ours.tar", self.images, self.records, digests=False)

    def ours_decoded(self) -> None:
        self._write_ours(self.folder / "ours.tar", map(_jpeg, self.pictures), self.records, digests=True)

    def _write_webdataset(self, images: Iterable[bytes]) -> None:
        with TarWriter(str(self.folder / "webdataset.tar")) as writer:
            for image, record in zip(images, self.records, strict=True):
                writer.write({"__key__": record["sample_key"], "jpg": image, "json": record, "txt": record["caption"]})

    def webdataset(self) -> None:
        self._write_webdataset(self.images)

    def webdataset_decoded(self) -> None:
        self._write_webdataset(map(_jpeg, self.pictures))

    def encoder(self) -> None:
        for picture in self.pictures:
            _jpeg(picture)

    def read_in_sequence(self) -> None:
        for path in self.shards:
            for sample in read_shard(path):
                decode_image(sample)

    def read_shuffled(self) -> None:
        samples = ShardSamples.of_shards(self.shards)
        for batch in ShardStream(samples, Share(batch_size=64, stop=len(samples)), seed=0):
            assert not batch.skipped

    def read_webdataset(self) -> None:
        for item in WebDataset([str(path) for path in self.shards], shardshuffle=False):  # type: ignore[arg-type]
            decode_image(Sample(item["__key__"], item["jpg"], item["txt"].decode(), json.loads(item["json"])))

    def decoder(self) -> None:
        for image in self.images:
            decode_image(Sample("", image, "", {}))


class _Img2dataset:
    """img2dataset's writer, in a process of the Python that has it."""

    def __init__(self, python: str, folder: Path) -> None:
        (folder / "img2dataset").mkdir()
        command = [python, "-c", _IMG2DATASET, str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._answer() != "ready":
            raise ThroughlineError(f"{python}: img2dataset's writer did not start; install img2dataset==1.47.0 there")

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def seconds(self, what: str) -> float:
        """Write all samples once; return the CPU seconds it took."""
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        self._process.communicate()


def _timed(work: Callable[[], None]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    return seconds


def main() -> None:
    """Measure every way `--rounds` times in turn; print rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--img2dataset", metavar="PYTHON", help="an interpreter that has img2dataset 1.47")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        world = _World(Path(name), args.samples)
        ways: dict[str, Callable[[], float]] = {
            "write encoded: ours": _timed(world.ours),
            "write encoded: ours, no digests in JSON": _timed(world.ours_without_digests),
            "write encoded: webdataset": _timed(world.webdataset),
            "write decoded: ours": _timed(world.ours_decoded),
            "write decoded: webdataset": _timed(world.webdataset_decoded),
            "write decoded: Pillow's encoder alone": _timed(world.encoder),
            "read and decode: ours, in sequence": _timed(world.read_in_sequence),
            "read and decode: ours, shuffled": _timed(world.read_shuffled),
            "read and decode: webdataset": _timed(world.read_webdataset),
            "read and decode: the decoder alone": _timed(world.decoder),
        }
        if args.img2dataset:
            other = _Img2dataset(args.img2dataset, world.folder)
            ways["write encoded: img2dataset"] = lambda: other.seconds("encoded")
            ways["write decoded: img2dataset"] = lambda: other.seconds("decoded")
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.rounds + 1):  # the first round warms up and is not counted
            for way, measure in ways.items():
                seconds[way].append(measure())
        if args.img2dataset:
            other.close()
        image_bytes = sum(map(len, world.images)) // args.samples
    write_results("shards", _measured(args.samples, image_bytes, {way: taken[1:] for way, taken in seconds.items()}))


def _measured(samples: int, image_bytes: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    def ratio(way: str, to: str) -> float:
        return round(statistics.median(b / a for a, b in zip(seconds[way], seconds[to], strict=True)), 2)

    rates = {f"{way}, per CPU second": round(samples / statistics.median(taken)) for way, taken in seconds.items()}
    pairs = [
        ("write encoded: ours", "write encoded: webdataset"),
        ("write encoded: ours, no digests in JSON", "write encoded: webdataset"),
        ("write decoded: ours", "write decoded: webdataset"),
        ("write encoded: ours", "write encoded: img2dataset"),
        ("write decoded: ours", "write decoded: img2dataset"),
        ("read and decode: ours, in sequence", "read and decode: webdataset"),
        ("read and decode: ours, shuffled", "read and decode: webdataset"),
        ("read and decode: ours, in sequence", "read and decode: the decoder alone"),
    ]
    ratios = {f"{way} / {to.partition(': ')[2]}": ratio(way, to) for way, to in pairs if to in seconds}
    return {"samples": samples, "bytes per picture": image_bytes, **rates, **ratios}


if __name__ == "__main__":
    main()
