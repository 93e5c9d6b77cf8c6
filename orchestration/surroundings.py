"""What the demo profile needs around its stages: its world, its text encoder, and its web while images are fetched."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestration.execution import Surroundings
from orchestration.profiles import Profile

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
    encoder = profile.text_encoder.path
    if encoder is not None:
        if not Path(encoder).is_dir():
            say(f"unpacking the demo's text encoder into {encoder}")
        text_encoder.prepare(Path(encoder))


@contextmanager
def demo_web(profile: Profile, asset: str) -> Iterator[None]:
    """Serve the demo's web while the images stage runs."""
    if asset != _FETCHES or profile.world is None:
        yield
        return
    from demo import web

    with web.serve(Path(profile.world.folder), profile.world.port):
        yield
