"""Services of the demo profile: its world, its text encoder, and a web server while images are downloaded."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestration.graph.execution import ServiceHooks
from orchestration.launch.launcher import PROJECT_ROOT
from orchestration.profiles.profile import Profile
from pipelines.core.errors import ThroughlineError

_DOWNLOAD_STAGE = "images"


def service_hooks(profile: Profile) -> ServiceHooks:
    """Return the demo's hooks for a profile with a demo world, and no hooks for any other."""
    if profile.world is None:
        return ServiceHooks()
    return ServiceHooks(prepare=prepare_demo, during=demo_web)


def prepare_demo(profile: Profile, log: Callable[[str], None]) -> None:
    """Create the demo's images, metadata and text encoder unless they exist."""
    from demo import text_encoder, world

    assert profile.world is not None
    folder = Path(profile.world.folder)
    if not folder.is_dir():
        log(f"building the demo world in {folder}")
    world.ensure_world(folder, num_images=profile.world.num_images, seed=profile.world.seed, port=profile.world.port)
    if profile.text_encoder.path is not None:
        encoder = Path(profile.text_encoder.path)
        if not encoder.is_dir():
            log(f"unpacking the demo's text encoder into {encoder}")
            _unpack_text_encoder(encoder)
        text_encoder.prepare(encoder)


def _unpack_text_encoder(folder: Path) -> None:
    """Unpack in a child process: importing torch and a gigabyte of memory would otherwise stay with this one."""
    command = [sys.executable, "-m", "demo.text_encoder", "--out", str(folder)]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ThroughlineError((lines[-1] if lines else f"status {done.returncode}").rpartition("Error: ")[2])


@contextmanager
def demo_web(profile: Profile, asset: str) -> Iterator[None]:
    """Run the demo's web server while the images stage runs."""
    if asset != _DOWNLOAD_STAGE or profile.world is None:
        yield
        return
    from demo import web

    with web.serve(Path(profile.world.folder), profile.world.port):
        yield
