from collections.abc import Iterator

import pytest

from tests.pipelines.hostile_server import HostileServer
from tests.pipelines.ray_world import GatedServer


@pytest.fixture(scope="session")
def server() -> Iterator[HostileServer]:
    with HostileServer() as running:
        yield running


@pytest.fixture
def gated() -> Iterator[GatedServer]:
    with GatedServer() as running:
        yield running
        running.gate.set()
