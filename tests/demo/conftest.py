import pytest

from demo.world import World, build_world
from tests.demo.ports import free_port


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world of one part that contains every flaw and every behaviour."""
    return build_world(tmp_path_factory.mktemp("world") / "w", seed=3, num_parts=1, rows_per_part=100, port=free_port())
