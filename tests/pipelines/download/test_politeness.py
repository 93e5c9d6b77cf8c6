"""Limits per host, retries and back-off, and reuse of connections."""

import asyncio
import time

import pytest

from pipelines.download.fetch import Fetched, Fetcher, HostThrottle
from tests.pipelines.download.fetching import (
    CountingResolver,
    config_for,
    fetch_all,
)
from tests.pipelines.download.hostile_server import JPEG, HostileServer
from tests.pipelines.download.polite_server import PoliteServer


def test_connections_are_reused() -> None:
    with PoliteServer() as polite:
        config = config_for(polite, connections_per_host=2)
        outcomes = fetch_all(config, [polite.url(f"/{number}") for number in range(12)])
        assert all(outcome.body == JPEG for outcome in outcomes)
        assert (polite.num_requests, polite.num_connections) == (12, 2)


def test_a_name_is_resolved_once_for_many_connections(server: HostileServer) -> None:
    resolver = CountingResolver()
    host = f"pictures.example:{server.port}"
    config = config_for(server, allowed_private_hosts=(host,), connections_per_host=1)
    outcomes = fetch_all(config, [f"http://{host}/jpeg?{number}" for number in range(6)], resolver)
    assert all(outcome.body == JPEG for outcome in outcomes)
    assert resolver.num_lookups == 1, "the server hangs up after each answer, so these were six connections"


@pytest.mark.slow
def test_only_transient_failures_are_retried(server: HostileServer) -> None:
    server.requests.clear()
    fetch_all(config_for(server), [server.url(path) for path in ("/500", "/404", "/503-long", "/stall", "/429")])
    assert dict(server.requests) == {"/500": 3, "/404": 1, "/503-long": 1, "/stall": 1, "/429": 3}


def test_connections_per_host_are_limited() -> None:
    with HostileServer() as server:
        config = config_for(server, connections_per_host=3, total_seconds=5.0)
        outcomes = fetch_all(config, [server.url(f"/slow-scene/{index}") for index in range(15)])
        assert all(outcome.status == "ok" for outcome in outcomes)
        assert 1 < server.most_concurrent <= 3


def test_requests_to_a_host_are_spaced_and_other_hosts_do_not_wait() -> None:
    hosts = HostThrottle(per_host=4, delay_seconds=0.05)
    begun: list[str] = []

    async def ask(host: str) -> None:
        async with hosts.hold(host):
            begun.append(host)

    async def run() -> float:
        start = time.monotonic()
        await asyncio.gather(*(ask(host) for host in ("slow", "slow", "slow", "other")))
        return time.monotonic() - start

    assert asyncio.run(run()) >= 0.1
    assert begun == ["slow", "other", "slow", "slow"]


@pytest.mark.slow
def test_retry_after_applies_to_the_whole_host(server: HostileServer) -> None:
    async def run() -> tuple[float, Fetched]:
        async with Fetcher(config_for(server, retries=0)) as fetcher:
            refused = await fetcher.fetch(server.url("/busy"))
            start = time.monotonic()
            assert (await fetcher.fetch(server.url("/jpeg"))).status == "ok"
            return time.monotonic() - start, refused

    waited_seconds, refused = asyncio.run(run())
    assert (refused.status, refused.retry_after_seconds) == ("http_too_many_requests", 1.0)
    assert waited_seconds > 0.8


def test_a_url_with_a_long_retry_after_is_not_requested_again(server: HostileServer) -> None:
    async def run() -> tuple[Fetched, Fetched, Fetched]:
        async with Fetcher(config_for(server)) as fetcher:
            first, second = [await fetcher.fetch(server.url("/503-long")) for _ in range(2)]
            return first, second, await fetcher.fetch(server.url("/jpeg"))

    server.requests.clear()
    first, second, other = asyncio.run(run())
    assert first == second
    assert first.status == "http_server_error"
    assert other.status == "ok"
    assert server.requests == {"/503-long": 1, "/jpeg": 1}
