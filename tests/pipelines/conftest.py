from collections.abc import Iterator

import pytest

from tests.pipelines.hostile_server import HostileServer


@pytest.fixture(scope="session")
def server() -> Iterator[HostileServer]:
    with HostileServer() as running:
        yield running
