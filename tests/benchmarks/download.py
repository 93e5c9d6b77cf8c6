"""What a downloaded picture costs: the stage `images` against img2dataset, from one server, in turn.

python -m tests.benchmarks.download [--pictures 1000] [--rounds 3] [--img2dataset PYTHON]

Rates are pictures per second of CPU time, the kernel's included, over all processes of a job. Each job is run with a
few pictures too, and the rate is of the difference, so that imports count for nobody. The server has a process of its
own that is not counted.

All ways get the same pictures (noise with the spectrum of photographs, long side 512 to 1024 px) under the same
loopback URLs, decode in two processes, resize the short side to 256 px, cut the centre, encode JPEG of quality 95, take
the SHA-256 of what came, and write parquet tables of 250 rows. img2dataset keeps its filter (OpenCV's area) and is
spared EXIF; the stage also takes perceptual hashes, states what became of each row and digests its files.

The steps of decoding are told one by one, and each filter beside Pillow's of the same name, on decoded squares.

The limit is decoding, resizing and encoding alone, from memory, in one thread: with Pillow and torch as in the stage,
and with OpenCV as in img2dataset. How far scaled decoding (`jpeg_decoding`) moves pixels is told by its median PSNR
against decoding whole, beside that of the area filter.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.core.config import FrozenConfig
from pipelines.core.errors import ThroughlineError
from pipelines.core.sample_key import sample_key
from pipelines.download.config import FetchConfig, ImagesConfig, ImageTransform
from pipelines.download.decode import decode, prepare_to_decode
from pipelines.download.perceptual_hash import perceptual_hash
from pipelines.download.resize import resize_and_crop
from pipelines.laion.subset import ROWS_FILE
from pipelines.runner.outputs import StageOutput
from pipelines.runner.request import StageRequest, write_request
from pipelines.runner.units import StageRun
from tests.benchmarks.record import write_results
from tests.plain_stage import plain_stage

_SIZE_PX, _QUALITY = 256, 95
_SHARD_ROWS = 250
_FEW = 20
_NUM_DISTINCT = 200
_PROCESSES, _CONNECTIONS = 2, 64
_FILTERS = ("bilinear", "bicubic", "lanczos", "box")
_PROJECT = Path(__file__).parents[2]

# Serves a folder of pictures with as little as HTTP/1.1 needs; prints its port, and ends with its standard input.
_SERVER = """
import asyncio, sys
from pathlib import Path
answers = {}
for path in Path(sys.argv[1]).glob("*.jpg"):
    body = path.read_bytes()
    head = f"HTTP/1.1 200 OK\\r\\nContent-Type: image/jpeg\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n"
    answers[path.name] = head.encode() + body
class Pictures(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.asked = transport, b""
    def data_received(self, data):
        self.asked += data
        while b"\\r\\n\\r\\n" in self.asked:
            head, _, self.asked = self.asked.partition(b"\\r\\n\\r\\n")
            name = head.split(b" ", 2)[1].decode().lstrip("/").partition("?")[0]
            self.transport.write(answers[name])
            if b"connection: close" in head.lower():
                self.transport.close()
async def main():
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    server = await loop.create_server(Pictures, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    loop.add_reader(sys.stdin.fileno(), done.set)
    await done.wait()
asyncio.run(main())
"""
_IMG2DATASET = """
import json, sys
from img2dataset import download
if __name__ == "__main__":
    download(**json.loads(sys.argv[1]))
"""
# Runs a command and prints the CPU seconds of all its processes, those that outlive their parents too: they become
# children of this one, and are waited for.
_RUNNER = """
import ctypes, os, resource, subprocess, sys
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
status = subprocess.call(sys.argv[1:], stdout=sys.stderr)
try:
    while True:
        os.wait()
except ChildProcessError:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(usage.ru_utime + usage.ru_stime)
sys.exit(status)
"""
# Both run in the other Python: the seconds of CPU time that its resizer takes for a folder of pictures, and its result.
_RESIZER = """
import io, sys, time
from pathlib import Path
import numpy as np
import cv2
from img2dataset.resizer import Resizer
resizer = Resizer(256, "center_crop", False, encode_quality=95)
streams = [io.BytesIO(path.read_bytes()) for path in sorted(Path(sys.argv[1]).glob("*.jpg"))]
resizer(streams[0])
start = time.process_time()
for stream in streams:
    assert resizer(stream)[5] is None
print((time.process_time() - start) / len(streams))
"""
_AREA = """
import sys
from pathlib import Path
import numpy as np
import cv2
squares = []
for path in sorted(Path(sys.argv[1]).glob("*.jpg")):
    image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    height, width = image.shape[:2]
    short = min(width, height)
    size = (256 * width // short, 256 * height // short)
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    left, top = round((size[0] - 256) / 2), round((size[1] - 256) / 2)
    squares.append(image[top:top + 256, left:left + 256, ::-1])
np.save(sys.argv[2], np.stack(squares))
"""


def write_pictures(folder: Path, count: int) -> None:
    """Write JPEGs as photographs are: power falls with frequency, sensor grain on top, common sizes and qualities."""
    rng = np.random.default_rng(0)
    for number in range(count):
        long, aspect = int(rng.integers(512, 1025)), float(rng.choice([1.0, 4 / 3, 1.5, 16 / 9]))
        size = (long, round(long / aspect)) if rng.random() < 0.6 else (round(long / aspect), long)
        pixels = np.full((size[1], size[0], 3), 128, dtype=np.float32)
        cells, strength = 3, 60.0
        while cells < long:
            noise = rng.normal(0, 1, (max(2, cells * size[1] // long), max(2, cells * size[0] // long), 3))
            layer = Image.fromarray(np.clip(128 + 40 * noise, 0, 255).astype(np.uint8))
            smooth = np.asarray(layer.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
            pixels += strength * (smooth - 128) / 40
            cells, strength = cells * 2, strength * 0.55
        pixels += rng.normal(0, 2.0, pixels.shape[:2]).astype(np.float32)[..., None]
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        options = {"quality": int(rng.integers(75, 93)), "progressive": bool(rng.random() < 0.2)}
        picture.save(folder / f"{number:05d}.jpg", "JPEG", **options)


@contextmanager
def _served(folder: Path) -> Iterator[int]:
    """Serve a folder while the context lasts; yield the port."""
    command = [sys.executable, "-c", _SERVER, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait()


class _RowsConfig(FrozenConfig):
    urls: tuple[str, ...]


def _write_rows(run: StageRun[_RowsConfig]) -> None:
    texts = [f"picture {number}" for number in range(len(run.config.urls))]
    keys = [sample_key(url, text) for url, text in zip(run.config.urls, texts, strict=True)]
    table = pa.table({"sample_key": keys, "url": run.config.urls, "alt_text": texts})
    with run.unit("rows") as unit, unit.open(ROWS_FILE, num_rows=table.num_rows) as stream:
        pq.write_table(table, stream)


_ROWS = plain_stage(name="laion_subset", code_version="benchmark", config_type=_RowsConfig, produce=_write_rows)


class _Jobs:
    """The ways to download `count` of the pictures, each as a command of its own."""

    def __init__(self, folder: Path, port: int, count: int) -> None:
        self._folder = folder
        self._port = port
        self._runs = 0
        urls = [f"http://127.0.0.1:{port}/{number % _NUM_DISTINCT:05d}.jpg?{number}" for number in range(count)]
        self._urls = {number: tuple(urls[:number]) for number in (_FEW, count)}
        self._tables: dict[int, Path] = {}
        self._subsets: dict[int, StageOutput] = {}
        for number, some in self._urls.items():
            self._subsets[number] = _ROWS.run(_RowsConfig(urls=some), {}, folder, "00000")
            self._tables[number] = folder / f"{number}.parquet"
            pq.write_table(
                pa.table({"url": some, "caption": [f"picture {n}" for n in range(number)]}), self._tables[number]
            )

    def ours(self, transform: ImageTransform, count: int) -> float:
        """Run the stage in a process of its own; return the CPU seconds of all its processes."""
        self._runs += 1
        root = self._folder / f"ours-{self._runs}"
        fetch = FetchConfig(
            allowed_private_hosts=(f"127.0.0.1:{self._port}",),
            total_connections=_CONNECTIONS,
            connections_per_host=_CONNECTIONS,
        )
        config = ImagesConfig(fetch=fetch, transform=transform, rows_per_shard=_SHARD_ROWS, decode_workers=_PROCESSES)
        request = StageRequest(
            stage="images",
            partition="00000",
            config=config.model_dump(mode="json"),
            inputs={"subset": [str(self._subsets[count].manifest_path)]},
            output_root=str(root),
        )
        write_request(self._folder / "request.json", request)
        command = [sys.executable, "-m", "pipelines.runner", "images", "--config", str(self._folder / "request.json")]
        seconds = _cpu_seconds(command, self._folder / "log")
        (manifest,) = root.glob("images/*/manifest.json")
        _check(count, StageOutput.load(manifest).manifest.summary["num_ok"], "the stage")
        return seconds

    def img2dataset(self, python: str, count: int) -> float:
        """Run img2dataset in a process of the Python that has it; return the CPU seconds of all its processes."""
        self._runs += 1
        out = self._folder / f"img2dataset-{self._runs}"
        options = {
            "url_list": str(self._tables[count]),
            "input_format": "parquet",
            "url_col": "url",
            "caption_col": "caption",
            "output_folder": str(out),
            "output_format": "parquet",
            "image_size": _SIZE_PX,
            "resize_mode": "center_crop",
            "encode_quality": _QUALITY,
            "processes_count": _PROCESSES,
            "thread_count": _CONNECTIONS // _PROCESSES,
            "number_sample_per_shard": _SHARD_ROWS,
            "compute_hash": "sha256",
            "extract_exif": False,
            "retries": 2,
        }
        seconds = _cpu_seconds([python, "-c", _IMG2DATASET, json.dumps(options)], self._folder / "log")
        statistics_of_shards = [json.loads(path.read_bytes()) for path in out.glob("*_stats.json")]
        _check(count, sum(item["successes"] for item in statistics_of_shards), "img2dataset")
        return seconds


def _cpu_seconds(command: Sequence[str], log_path: Path) -> float:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_PROJECT)}
    with log_path.open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-c", _RUNNER, *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=environment, text=True, check=False
        )  # fmt: skip
    if done.returncode:
        last = log_path.read_text(errors="replace").strip().splitlines()[-1:]
        raise ThroughlineError(f"{command[0]}: ended with status {done.returncode}: {' '.join(last)}")
    return float(done.stdout)


def _check(expected: int, found: int, who: str) -> None:
    if found != expected:
        raise ThroughlineError(
            f"{who}: {found} of {expected} pictures arrived; the rates would not be of the same work"
        )


def _bare(bodies: Sequence[bytes]) -> None:
    """Decode, resize and encode as the stage does, and nothing else."""
    for body in bodies:
        square = resize_and_crop(Image.open(io.BytesIO(body)), _SIZE_PX, ImageTransform().resample)
        square.save(io.BytesIO(), "JPEG", quality=_QUALITY)


def _of_steps(folder: Path, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of each step of decoding a picture, and what each filter takes of Pillow's time."""
    bodies = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    pictures = [_loaded(body) for body in bodies]
    squares = [resize_and_crop(picture, _SIZE_PX, "bilinear") for picture in pictures]
    steps: dict[str, Callable[[], object]] = {
        "JPEG decoding": lambda: [_loaded(body) for body in bodies],
        "JPEG encoding": lambda: [_encoded(square) for square in squares],
        "perceptual hash": lambda: [perceptual_hash(square) for square in squares],
    }
    for name in _FILTERS:
        steps[f"filter {name}"] = partial(_resize_all, pictures, name)
        steps[f"Pillow's filter {name}"] = partial(_resize_all_with_pillow, pictures, name)
    each: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, work in steps.items():
            each[name].append(1e3 * _seconds_each(work, len(bodies)))
    measured: dict[str, Any] = {
        f"step {name}, ms": round(statistics.median(each[name]), 2) for name in steps if not name.startswith("Pillow")
    }
    for name in _FILTERS:
        pairs = zip(each[f"Pillow's filter {name}"], each[f"filter {name}"], strict=True)
        measured[f"filter {name}: times Pillow's speed"] = round(
            statistics.median(theirs / ours for theirs, ours in pairs), 1
        )
    return measured


def _loaded(body: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(body))
    picture.load()
    return picture


def _resize_all(pictures: Sequence[Image.Image], name: str) -> None:
    for picture in pictures:
        resize_and_crop(picture, _SIZE_PX, name)


def _resize_all_with_pillow(pictures: Sequence[Image.Image], name: str) -> None:
    for picture in pictures:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = (left, top, left + side, top + side)
        picture.resize((_SIZE_PX, _SIZE_PX), Image.Resampling[name.upper()], box=box)


def _encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _seconds_each(work: Callable[[], object], count: int) -> float:
    start = time.process_time()
    work()
    return (time.process_time() - start) / count


def _squares(folder: Path, bodies: Sequence[bytes], transform: ImageTransform) -> np.ndarray:
    """Return the pictures as the stage makes them, uint8 (N, H, W, 3), hardly touched by the encoder."""
    fine = transform.model_copy(update={"jpeg_quality": 100, "jpeg_subsampling": "4:4:4"})
    return np.stack([np.asarray(Image.open(io.BytesIO(decode(body, fine).image))) for body in bodies])


def _psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the median over pictures, uint8 (N, H, W, 3), in dB."""
    errors = ((found.astype(np.float32) - expected) ** 2).mean(axis=(1, 2, 3))
    return round(float(np.median(10 * np.log10(255**2 / np.maximum(errors, 1e-9)))), 1)


def _of_decoders(
    folder: Path, transforms: dict[str, ImageTransform], python: str | None, rounds: int
) -> dict[str, Any]:
    """Return what decoding costs without any network, and how far from each other the decoders' pixels are."""
    bodies = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    prepare_to_decode()
    works: dict[str, Callable[[], float]] = {
        "decoding alone: no checks, no hashes": lambda: _seconds_each(lambda: _bare(bodies), len(bodies))
    }
    for name, transform in transforms.items():
        works[f"decoding alone: {name}"] = partial(
            _seconds_each, lambda chosen=transform: [decode(body, chosen) for body in bodies], len(bodies)
        )
    if python:
        works["decoding alone: img2dataset's resizer"] = lambda: float(_output([python, "-c", _RESIZER, str(folder)]))
    each: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            each[name].append(work())
    measured: dict[str, Any] = {
        f"{name}, pictures per CPU second": round(1 / statistics.median(taken), 1) for name, taken in each.items()
    }
    whole, *others = transforms
    raw = [np.asarray(Image.open(io.BytesIO(body)).resize((_SIZE_PX, _SIZE_PX))) for body in bodies]
    encoded = [Image.open(io.BytesIO(_encoded(Image.fromarray(pixels)))) for pixels in raw]
    measured[f"pixels: JPEG quality {_QUALITY} against its input, dB"] = _psnr(np.stack(encoded), np.stack(raw))
    expected = _squares(folder, bodies, transforms[whole])
    for name in others:
        measured[f"pixels: {name} against {whole}, dB"] = _psnr(_squares(folder, bodies, transforms[name]), expected)
    if python:
        target = folder / "area.npy"
        _output([python, "-c", _AREA, str(folder), str(target)])
        measured[f"pixels: OpenCV's area filter against {whole}, dB"] = _psnr(np.load(target), expected)
    return measured


def _output(command: Sequence[str]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    """Measure every way `--rounds` times in turn; print rates and their ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--img2dataset", metavar="PYTHON", help="an interpreter that has img2dataset 1.47")
    args = parser.parse_args()
    if not args.img2dataset:
        print("the stage is measured alone; for the comparison name a Python that has it: --img2dataset PYTHON")
    whole = ImageTransform(size_px=_SIZE_PX, jpeg_quality=_QUALITY)
    transforms = {"stage": whole, "stage, scaled decoding": whole.model_copy(update={"jpeg_decoding": "scaled"})}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        web = folder / "web"
        web.mkdir()
        write_pictures(web, _NUM_DISTINCT)
        num_bytes = sum(path.stat().st_size for path in web.iterdir()) // _NUM_DISTINCT
        with _served(web) as port:
            jobs = _Jobs(folder, port, args.pictures)
            ways: dict[str, Callable[[int], float]] = {
                way: partial(jobs.ours, transform) for way, transform in transforms.items()
            }
            if args.img2dataset:
                ways["img2dataset"] = partial(jobs.img2dataset, args.img2dataset)
            each: dict[str, list[float]] = {way: [] for way in ways}
            few: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(args.rounds):
                for way, job in ways.items():
                    few[way].append(job(_FEW))
                    each[way].append((job(args.pictures) - few[way][-1]) / (args.pictures - _FEW))
        decoders = _of_decoders(web, transforms, args.img2dataset, args.rounds) | _of_steps(web, args.rounds)
    measured: dict[str, Any] = {"pictures": args.pictures, "bytes per picture": num_bytes}
    for way in ways:
        measured[f"{way}: pictures per CPU second"] = round(1 / statistics.median(each[way]), 1)
        measured[f"{way}: CPU seconds of a job of {_FEW}"] = round(statistics.median(few[way]), 2)
    if args.img2dataset:
        version = _output(
            [args.img2dataset, "-c", "from importlib.metadata import version; print(version('img2dataset'))"]
        )
        measured["img2dataset"] = version.strip()
        for way in transforms:
            ratios = [theirs / ours for ours, theirs in zip(each[way], each["img2dataset"], strict=True)]
            measured[f"{way} / img2dataset"] = round(statistics.median(ratios), 2)
            measured[f"{way} / img2dataset, by rounds"] = sorted(round(ratio, 2) for ratio in ratios)
    write_results("download", measured | decoders)


if __name__ == "__main__":
    main()
