from collections.abc import Iterator

import pytest

from tests.pipelines.cluster.ray_world import GatedServer
from tests.pipelines.data_world import World, run_world
from tests.pipelines.download.hostile_server import HostileServer


@pytest.fixture(scope="session")
def server() -> Iterator[HostileServer]:
    with HostileServer() as running:
        yield running


@pytest.fixture
def gated() -> Iterator[GatedServer]:
    with GatedServer() as running:
        yield running
        running.gate.set()


@pytest.fixture(scope="session")
def world(server: HostileServer, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Outputs of the data stages, shared by all tests, which must not change them."""
    return run_world(server, tmp_path_factory.mktemp("world"))
