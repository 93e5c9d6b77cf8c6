"""What the demo profile needs around its stages: its world, its text encoder, and its web while images are fetched."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestration.graph.execution import Surroundings
from orchestration.launch.launcher import PROJECT_ROOT
from orchestration.profiles.profile import Profile
from pipelines.core.errors import ThroughlineError

_FETCHES = "images"


def surroundings_of(profile: Profile) -> Surroundings:
    """Return the demo's surroundings for a profile with a demo world, and none for any other."""
    if profile.world is None:
        return Surroundings()
    return Surroundings(prepare=prepare_demo, during=demo_web)


def prepare_demo(profile: Profile, say: Callable[[str], None]) -> None:
    """Make the demo's pictures, metadata and text encoder, once."""
    from demo import text_encoder, world

    assert profile.world is not None
    folder = Path(profile.world.folder)
    if not folder.is_dir():
        say(f"drawing the demo world in {folder}")
    world.ensure_world(folder, num_images=profile.world.num_images, seed=profile.world.seed, port=profile.world.port)
    if profile.text_encoder.path is not None:
        encoder = Path(profile.text_encoder.path)
        if not encoder.is_dir():
            say(f"unpacking the demo's text encoder into {encoder}")
            _unpack_text_encoder(encoder)
        text_encoder.prepare(encoder)


def _unpack_text_encoder(folder: Path) -> None:
    """Unpack in a process of its own: it takes torch and a gigabyte, which this one is spared."""
    command = [sys.executable, "-m", "demo.text_encoder", "--out", str(folder)]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ThroughlineError((said[-1] if said else f"status {done.returncode}").rpartition("Error: ")[2])


@contextmanager
def demo_web(profile: Profile, asset: str) -> Iterator[None]:
    """Serve the demo's web while the images stage runs."""
    if asset != _FETCHES or profile.world is None:
        yield
        return
    from demo import web

    with web.serve(Path(profile.world.folder), profile.world.port):
        yield
