"""Helpers of the tests that fetch: configuration, deny lists, and resolvers."""

import asyncio
import socket
from pathlib import Path

from aiohttp.abc import AbstractResolver, ResolveResult

from pipelines.download.config import FetchConfig
from pipelines.download.fetch import Fetched, Fetcher
from pipelines.laion.config import EntryList
from tests.pipelines.download.hostile_server import HostileServer
from tests.pipelines.download.polite_server import PoliteServer
from tests.pipelines.laion.laion_world import entry_list


def config_for(server: HostileServer | PoliteServer, **changes: object) -> FetchConfig:
    values: dict[str, object] = {
        "connect_seconds": 1.0,
        "read_seconds": 1.0,
        "total_seconds": 2.5,
        "retries": 2,
        "retry_timeouts": False,
        "backoff_seconds": 0.01,
        "max_body_bytes": 1_000_000,
        "opt_out_agent": "TestBot",
        "allowed_private_hosts": (server.host,),
    }
    return FetchConfig.model_validate(values | changes)


def fetch_all(config: FetchConfig, urls: list[str], resolver: AbstractResolver | None = None) -> list[Fetched]:
    async def run() -> list[Fetched]:
        async with Fetcher(config, resolver=resolver) as fetcher:
            return await asyncio.gather(*(fetcher.fetch(url) for url in urls))

    return asyncio.run(run())


def lists_for(server: HostileServer, folder: Path) -> dict[str, EntryList]:
    """Deny lists, written to `folder`."""
    urls = [server.url("/taken-down.jpg"), server.url("/taken down.jpg")]
    return {
        "opt_outs": entry_list(folder / "opt-outs.txt", "artist.example", "münchen.example", "0" * 32, *urls),
        "urls_denied": entry_list(folder / "urls.txt", "http://pictures.example/denied.jpg"),
        "domains_denied": entry_list(folder / "domains.txt", "denied.example", "[2606:2800:21f::1]"),
    }


class FixedResolver(AbstractResolver):
    """Returns its answers one after the other; repeats the last."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [
            ResolveResult(hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0)
            for address in addresses
        ]

    async def close(self) -> None:
        return None


class NoResolver(FixedResolver):
    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


class AskedResolver(NoResolver):
    def __init__(self) -> None:
        super().__init__([])
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked.append(host)
        return await super().resolve(host, port, family)


class CountingResolver(FixedResolver):
    def __init__(self) -> None:
        super().__init__(["127.0.0.1"])
        self.num_lookups = 0

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.num_lookups += 1
        return await super().resolve(host, port, family)
