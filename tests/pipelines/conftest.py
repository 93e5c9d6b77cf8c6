from collections.abc import Iterator

import pytest

from tests.pipelines.cluster.ray_world import GatedServer
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
