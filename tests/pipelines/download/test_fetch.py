import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from pipelines.core.errors import ThroughlineError
from pipelines.download.config import FetchConfig, ImageTransform
from pipelines.download.decode import decode
from pipelines.download.decode_pool import DecodePool
from pipelines.download.fetch import Fetched, Fetcher, _Hosts
from pipelines.download.status import FetchStatus
from pipelines.laion.config import EntryList
from tests.pipelines.download.bad_decoder import UnloadableDecoder, decode_or_misbehave, decode_to_much
from tests.pipelines.download.hostile_server import JPEG, HostileServer
from tests.pipelines.download.polite_server import PoliteServer, self_signed
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


TRANSFORM = ImageTransform(min_source_side_px=8, max_source_aspect=10)

# path -> what becomes of it, download and decoding together
EXPECTED = {
    "/jpeg": "ok",
    "/png": "ok",
    "/webp": "ok",
    "/gif": "ok",
    "/grey.jpg": "ok",
    "/cmyk.jpg": "ok",
    "/palette.png": "ok",
    "/wrong-type": "ok",
    "/no-type": "ok",
    "/no-length": "ok",
    "/odd-header-bytes": "ok",
    "/gzipped": "ok",
    "/redirect": "ok",
    "/flaky": "ok",
    "/flaky-reset": "ok",
    "/noai-other": "ok",
    "/deflated": "ok",
    "/jpeg-then-junk": "ok",
    "/early-hints": "ok",
    "/gzip-bomb": "body_too_large",
    "/gzip-twice": "not_an_image",
    "/zstd": "bad_content_encoding",
    "/two-encodings": "bad_content_encoding",
    "/gzip-lie": "bad_content_encoding",
    "/gzip-cut": "bad_content_encoding",
    "/brotli": "bad_content_encoding",
    "/404": "http_not_found",
    "/410": "http_not_found",
    "/403": "http_forbidden",
    "/451": "http_forbidden",
    "/400": "http_client_error",
    "/418": "http_client_error",
    "/401": "http_forbidden",
    "/407": "http_forbidden",
    "/408": "http_client_error",
    "/502": "http_server_error",
    "/504": "http_server_error",
    "/300": "http_unexpected",
    "/429": "http_too_many_requests",
    "/500": "http_server_error",
    "/503-long": "http_server_error",
    "/204": "http_unexpected",
    "/206": "http_unexpected",
    "/304": "http_unexpected",
    "/999": "http_unexpected",
    "/empty": "body_empty",
    "/html": "html",
    "/html-comment": "html",
    "/html-after-mark": "html",
    "/html-wide": "not_an_image",
    "/xml-error": "not_an_image",
    "/script-in-gif": "image_corrupt",
    "/zip": "not_an_image",
    "/blank-then-jpeg": "not_an_image",
    "/heic": "format_not_allowed",
    "/jxl": "format_not_allowed",
    "/text": "not_an_image",
    "/json": "not_an_image",
    "/zeros": "not_an_image",
    "/svg": "format_not_allowed",
    "/bmp": "format_not_allowed",
    "/tiff": "format_not_allowed",
    "/avif": "format_not_allowed",
    "/pdf": "format_not_allowed",
    "/mp4": "format_not_allowed",
    "/truncated.jpg": "image_truncated",
    "/truncated.png": "image_truncated",
    "/header-only.jpg": "image_corrupt",
    "/corrupt.png": "image_corrupt",
    "/corrupt.webp": "image_corrupt",
    "/bomb.png": "too_many_pixels",
    "/bomb.gif": "too_many_pixels",
    "/apng": "animated",
    "/pixel": "too_small",
    "/text-bomb.png": "image_corrupt",
    "/tiny": "too_small",
    "/wide": "aspect_extreme",
    "/animated.gif": "animated",
    "/animated.webp": "animated",
    "/noai": "opted_out",
    "/noimageai": "opted_out",
    "/noai-agent": "opted_out",
    "/noai-redirect": "opted_out",
    "/noai-404": "opted_out",
    "/noai-second-line": "opted_out",
    "/redirect-nowhere": "bad_redirect",
    "/redirect-file": "bad_redirect",
    "/redirect-ftp": "bad_redirect",
    "/redirect-garbage": "bad_redirect",
    "/redirect-script": "bad_redirect",
    "/redirect-data": "bad_redirect",
    "/redirect-self": "redirect_loop",
    "/redirect-to-404": "http_not_found",
    "/redirect-to-html": "html",
    "/redirect-same-scheme": "blocked_address",
    "/redirect-loopback-6": "blocked_address",
    "/redirect-user": "blocked_address",
    "/redirect-metadata": "blocked_address",
    "/redirect-private": "blocked_address",
    "/redirect-localhost": "blocked_address",
    "/redirect-mapped": "blocked_address",
    "/redirect-opted-out-domain": "opted_out",
    "/redirect-opted-out-idn": "opted_out",
    "/redirect-opted-out-url": "opted_out",
    "/redirect-opted-out-spaces": "opted_out",
    "/redirect-denied-domain": "domain_denied",
    "/redirect-denied-url": "url_denied",
    "/redirect-denied-late": "domain_denied",
    "/redirect-denied-address": "domain_denied",
    "/loop-a": "redirect_loop",
    "/deep/0": "too_many_redirects",
    "/oversized": "body_too_large",
    "/endless": "body_too_large",
    "/short-body": "body_incomplete",
    "/cut-chunks": "body_incomplete",
    "/bad-chunks": "bad_http",
    "/not-http": "bad_http",
    "/bad-length": "bad_http",
    "/long-header": "bad_http",
    "/two-lengths": "bad_http",
    "/no-status": "bad_http",
    "/huge-length": "body_too_large",
    "/half-a-head": "disconnected",
    "/stall-head": "read_timeout",
    "/many-headers": "bad_http",
    "/nothing": "disconnected",
    "/reset": "disconnected",
    "/stall": "read_timeout",
    "/stall-body": "read_timeout",
    "/drip": "total_timeout",
}


def lists_for(server: HostileServer, folder: Path) -> dict[str, EntryList]:
    """What the owner of a data set may not use, or doesn't want."""
    urls = [server.url("/taken-down.jpg"), server.url("/taken down.jpg")]
    return {
        "opt_outs": entry_list(folder / "opt-outs.txt", "artist.example", "münchen.example", "0" * 32, *urls),
        "urls_denied": entry_list(folder / "urls.txt", "http://pictures.example/denied.jpg"),
        "domains_denied": entry_list(folder / "domains.txt", "denied.example", "[2606:2800:21f::1]"),
    }


def test_every_hostile_answer_gets_its_status_and_none_disturbs_another(server: HostileServer, tmp_path: Path) -> None:
    config = config_for(server, **lists_for(server, tmp_path))
    start = time.monotonic()
    outcomes = fetch_all(config, [server.url(path) for path in EXPECTED])
    assert time.monotonic() - start < 15
    found = {
        path: (outcome.status if outcome.status != "ok" else decode(outcome.body, TRANSFORM).status).value
        for path, outcome in zip(EXPECTED, outcomes, strict=True)
    }
    assert found == EXPECTED
    assert sum(status != "ok" for status in EXPECTED.values()) >= 60  # a count that is promised, whatever is tidied up


@pytest.mark.slow
def test_details_are_the_same_on_every_run(server: HostileServer) -> None:
    urls = [server.url(path) for path in ("/500", "/stall", "/nothing", "/loop-a", "/not-http", "/noai")]
    first, second = (fetch_all(config_for(server), urls) for _ in range(2))
    assert [(item.status, item.detail) for item in first] == [(item.status, item.detail) for item in second]


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("ftp://example.com/x.jpg", "bad_url"),
        ("file:///etc/passwd", "bad_url"),
        ("http://", "bad_url"),
        ("not a url", "bad_url"),
        ("", "bad_url"),
        ("http://[::1", "bad_url"),
        ("http://x:99999/", "bad_url"),
        ("http://127.0.0.1:80/", "blocked_address"),
        ("http://localhost/", "blocked_address"),
        ("http://[::1]/", "blocked_address"),
        ("http://[::ffff:10.0.0.1]/", "blocked_address"),
        ("http://[64:ff9b::7f00:1]/", "blocked_address"),
        ("http://[2002:7f00:1::]/", "blocked_address"),
        ("http://[fe80::1%25lo]/", "blocked_address"),
        ("http://[fd00:ec2::254]/", "blocked_address"),
        ("http://169.254.169.254/latest", "blocked_address"),
        ("http://100.100.100.200/", "blocked_address"),
        ("http://0.0.0.0/", "blocked_address"),
        ("http://224.0.0.1/", "blocked_address"),
        ("http://2130706433/", "bad_url"),
        ("http://127.1/", "bad_url"),
        ("http://0x7f.0.0.1/", "blocked_address"),
        ("http://user:secret@127.0.0.1/", "blocked_address"),
        (f"http://{'a' * 70}.example/", "bad_url"),
    ],
)
def test_urls_that_must_not_be_asked_for(server: HostileServer, url: str, status: str) -> None:
    (outcome,) = fetch_all(config_for(server, retries=0), [url])
    assert outcome.status in (status, "bad_url" if status == "blocked_address" and "0x7f" in url else status)
    assert "secret" not in outcome.detail


class FixedResolver(AbstractResolver):
    """Answers each lookup with the next of its answers."""

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


def test_a_name_with_one_private_address_among_public_ones_is_refused(server: HostileServer) -> None:
    (outcome,) = fetch_all(
        config_for(server), [f"http://rebind.example:{server.port}/jpeg"], FixedResolver(["93.184.216.34", "127.0.0.1"])
    )
    assert outcome.status == FetchStatus.BLOCKED_ADDRESS
    assert "rebind.example is 127.0.0.1 (loopback)" in outcome.detail


def test_a_second_dns_answer_cannot_slip_in(server: HostileServer) -> None:
    """The public address that was checked is the one connected to, although the name would now resolve to loopback."""
    resolver = FixedResolver(["192.0.3.1"], ["127.0.0.1"])
    before = server.requests["/jpeg"]
    (outcome,) = fetch_all(config_for(server, retries=0), [f"http://rebind.example:{server.port}/jpeg"], resolver)
    assert outcome.status in (FetchStatus.CONNECT_ERROR, FetchStatus.CONNECT_TIMEOUT, FetchStatus.TOTAL_TIMEOUT)
    assert server.requests["/jpeg"] == before


class NoResolver(FixedResolver):
    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_names_that_do_not_resolve_and_servers_that_do_not_speak_tls(server: HostileServer) -> None:
    unknown, plain = fetch_all(
        config_for(server), ["http://nowhere.example/x.jpg", f"https://{server.host}/jpeg"], NoResolver([])
    )
    assert (unknown.status, unknown.detail) == (FetchStatus.DNS_ERROR, "nowhere.example:80: name not resolved")
    assert plain.status == FetchStatus.TLS_ERROR
    assert server.host in plain.detail


class AskedResolver(NoResolver):
    def __init__(self) -> None:
        super().__init__([])
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked.append(host)
        return await super().resolve(host, port, family)


def test_what_the_lists_deny_is_not_asked_for_nor_looked_up(server: HostileServer, tmp_path: Path) -> None:
    config, resolver = config_for(server, **lists_for(server, tmp_path)), AskedResolver()
    paths = ["/redirect-opted-out-domain", "/redirect-denied-late", "/taken down.jpg"]
    urls = ["http://a.artist.example/x", "http://pictures.example/denied.jpg", "http://pictures.example/other.jpg"]
    server.requests.clear()
    outcomes = fetch_all(config, [*map(server.url, paths), *urls], resolver)
    statuses = [outcome.status.value for outcome in outcomes]
    assert statuses == ["opted_out", "domain_denied", "opted_out", "opted_out", "url_denied", "dns_error"]
    assert outcomes[0].detail == "http://cdn.artist.example/x.jpg"
    assert set(resolver.asked) == {"pictures.example"}
    assert server.requests == dict.fromkeys((*paths[:2], "/redirect-denied-domain"), 1)


def test_a_list_that_was_changed_stops_the_download_before_it_begins(server: HostileServer, tmp_path: Path) -> None:
    lists = lists_for(server, tmp_path)
    (tmp_path / "urls.txt").write_text("another\n")
    with pytest.raises(ThroughlineError, match=r"urls.txt: SHA-256 .* the list has changed, set its new digest"):
        Fetcher(config_for(server, **lists))


class CountingResolver(FixedResolver):
    def __init__(self) -> None:
        super().__init__(["127.0.0.1"])
        self.num_lookups = 0

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.num_lookups += 1
        return await super().resolve(host, port, family)


def test_connections_are_kept_and_used_again() -> None:
    with PoliteServer() as polite:
        config = config_for(polite, connections_per_host=2)
        outcomes = fetch_all(config, [polite.url(f"/{number}") for number in range(12)])
        assert all(outcome.body == JPEG for outcome in outcomes)
        assert (polite.num_requests, polite.num_connections) == (12, 2)


def test_a_name_is_looked_up_once_however_many_connections_it_takes(server: HostileServer) -> None:
    resolver = CountingResolver()
    host = f"pictures.example:{server.port}"
    config = config_for(server, allowed_private_hosts=(host,), connections_per_host=1)
    outcomes = fetch_all(config, [f"http://{host}/jpeg?{number}" for number in range(6)], resolver)
    assert all(outcome.body == JPEG for outcome in outcomes)
    assert resolver.num_lookups == 1, "the server hangs up after each answer, so these were six connections"


def test_a_certificate_must_be_vouched_for_unless_that_is_switched_off(tmp_path: Path) -> None:
    with PoliteServer(self_signed(tmp_path / "server.pem")) as polite:
        (refused,) = fetch_all(config_for(polite), [polite.url("/a")])
        assert (refused.status, polite.num_requests) == (FetchStatus.TLS_ERROR, 0)
        assert "CERTIFICATE_VERIFY_FAILED" in refused.detail
        (taken,) = fetch_all(config_for(polite, verify_tls=False), [polite.url("/a")])
        assert (taken.status, taken.body, taken.final_url) == (FetchStatus.OK, JPEG, polite.url("/a"))


def test_an_allowed_host_is_allowed_on_its_port_alone(server: HostileServer) -> None:
    (outcome,) = fetch_all(config_for(server, allowed_private_hosts=("127.0.0.1:1",)), [server.url("/jpeg")])
    assert outcome.status == FetchStatus.BLOCKED_ADDRESS
    (outcome,) = fetch_all(config_for(server), [server.url("/jpeg")])
    assert outcome.body == JPEG


@pytest.mark.slow
def test_what_can_heal_is_asked_again_and_what_cannot_is_not(server: HostileServer) -> None:
    server.requests.clear()
    fetch_all(config_for(server), [server.url(path) for path in ("/500", "/404", "/503-long", "/stall", "/429")])
    assert dict(server.requests) == {"/500": 3, "/404": 1, "/503-long": 1, "/stall": 1, "/429": 3}


def test_a_host_gets_no_more_connections_than_its_limit() -> None:
    with HostileServer() as server:
        config = config_for(server, connections_per_host=3, total_seconds=5.0)
        outcomes = fetch_all(config, [server.url(f"/slow-scene/{index}") for index in range(15)])
        assert all(outcome.status == "ok" for outcome in outcomes)
        assert 1 < server.most_concurrent <= 3


def test_requests_to_a_host_keep_their_distance_and_other_hosts_do_not_wait() -> None:
    hosts = _Hosts(per_host=4, delay_seconds=0.05)
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
def test_a_server_that_asks_for_a_wait_gets_it_for_its_whole_host(server: HostileServer) -> None:
    async def run() -> tuple[float, Fetched]:
        async with Fetcher(config_for(server, retries=0)) as fetcher:
            refused = await fetcher.fetch(server.url("/busy"))
            start = time.monotonic()
            assert (await fetcher.fetch(server.url("/jpeg"))).status == "ok"
            return time.monotonic() - start, refused

    waited_seconds, refused = asyncio.run(run())
    assert (refused.status, refused.retry_after_seconds) == ("http_too_many_requests", 1.0)
    assert waited_seconds > 0.8


def test_a_url_whose_server_asks_for_a_long_wait_is_not_asked_for_again(server: HostileServer) -> None:
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


@pytest.mark.slow
def test_a_dead_or_hung_decoder_takes_no_other_picture_along() -> None:
    async def run() -> list[str]:
        bodies = [JPEG, b"die", JPEG, b"hang", JPEG]
        async with DecodePool(2, 1.0, TRANSFORM, decode_or_misbehave) as pool:
            return [outcome.status.value for outcome in await asyncio.gather(*map(pool.decode, bodies))]

    assert asyncio.run(run()) == ["ok", "decoder_crashed", "ok", "decode_timeout", "ok"]


@pytest.mark.slow
def test_decoding_goes_on_with_a_new_server_of_workers_where_theirs_is_gone() -> None:
    async def run() -> list[str]:
        bodies = [JPEG, b"end the server", JPEG, JPEG]
        async with DecodePool(2, 5.0, TRANSFORM, decode_or_misbehave) as pool:
            outcomes = [*await asyncio.gather(*map(pool.decode, bodies)), await pool.decode(JPEG)]
            return [outcome.status.value for outcome in outcomes]

    assert asyncio.run(run()) == ["ok", "decoder_crashed", "ok", "ok", "ok"]


@pytest.mark.slow
def test_a_worker_that_dies_while_it_hands_a_picture_over_is_not_waited_for() -> None:
    async def run() -> list[str]:
        async with DecodePool(2, 0.5, TRANSFORM, decode_or_misbehave) as pool:
            await asyncio.gather(pool.decode(JPEG), pool.decode(JPEG))
            bodies = [b"die while handing over", JPEG]
            return [outcome.status.value for outcome in await asyncio.gather(*map(pool.decode, bodies))]

    assert asyncio.run(run()) == ["decoder_crashed", "ok"]


@pytest.mark.slow
def test_a_pool_that_is_stopped_in_the_middle_of_its_work_ends() -> None:
    code = "from tests.pipelines.download.test_fetch import stop_busy_pools; stop_busy_pools()"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def stop_busy_pools() -> None:
    async def run(seconds: float) -> None:
        async with DecodePool(2, 5.0, TRANSFORM, decode_to_much) as pool:
            await pool.decode(JPEG)
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(pool.decode(JPEG) for _ in range(100)))

    for attempt in range(8):
        with pytest.raises(TimeoutError):
            asyncio.run(run(0.05 + attempt / 100))


@pytest.mark.slow
def test_a_folder_for_temporary_files_that_is_of_no_use_is_named(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    code = "from tests.pipelines.download.test_fetch import decode_one; decode_one()"
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "decode workers cannot be started: AF_UNIX path too long" in last
    assert str(folder) in last
    assert "TMPDIR" in last


def decode_one() -> None:
    async def run() -> None:
        async with DecodePool(1, 5.0, TRANSFORM) as pool:
            await pool.decode(JPEG)

    asyncio.run(run())


def test_workers_that_cannot_start_stop_the_job_in_one_sentence() -> None:
    async def run() -> None:
        async with DecodePool(1, 5.0, TRANSFORM, UnloadableDecoder()) as pool:
            await pool.decode(JPEG)

    with pytest.raises(ThroughlineError, match="decode workers cannot be started"):
        asyncio.run(run())
