"""Fetches URLs over HTTP: limits, redirects, retries, opt-outs. Failures are statuses, never exceptions.

`pipelines.download.decode` interprets the bytes.
"""

import asyncio
import errno
import random
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from pipelines.download.config import FetchConfig
from pipelines.download.ssrf_guard import BlockedAddressError, GuardedResolver, check_literal
from pipelines.download.status import RETRYABLE, TIMEOUTS, FetchStatus
from pipelines.laion.block_lists import denials_of

_DETAIL_CHARS = 200
_DNS_CACHE_SECONDS = 300
# Supported content encodings, with zlib's window argument. Images gain nothing from any, so none is requested.
_INFLATE_WINDOW: dict[str, int | None] = {
    "": None,
    "identity": None,
    "gzip": 16 + zlib.MAX_WBITS,
    "x-gzip": 16 + zlib.MAX_WBITS,
    "deflate": zlib.MAX_WBITS,
}
# A bare image/* makes servers with content negotiation send AVIF.
_ACCEPT = "image/jpeg, image/png, image/webp, image/gif, */*;q=0.1"
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HOSTS_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """The outcome for one URL. `body` is the content after content decoding; empty unless status is ok."""

    status: FetchStatus
    http_status: int | None = None
    detail: str = ""
    body: bytes = b""
    content_type: str | None = None
    final_url: str | None = None
    retry_after_seconds: float | None = None


def plain_text(text: str) -> str:
    """Return text from the network shortened and made safe for tables and terminals."""
    text = text.encode("utf-8", "replace").decode()
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)[:_DETAIL_CHARS]


class HostThrottle:
    """Per-host politeness: limits connections, spaces out requests, and backs off for as long as the host asks.

    Keeps state only for hosts with requests or a back-off, so that memory follows activity.
    """

    def __init__(self, per_host: int, delay_seconds: float) -> None:
        self._per_host = per_host
        self._delay_seconds = delay_seconds
        self._slots: dict[str, tuple[asyncio.Semaphore, list[None]]] = {}
        self._free_at: dict[str, float] = {}

    @asynccontextmanager
    async def hold(self, host: str) -> AsyncIterator[None]:
        semaphore, users = self._slots.setdefault(host, (asyncio.Semaphore(self._per_host), []))
        users.append(None)
        try:
            async with semaphore:
                await self._wait_for_turn(host)
                yield
        finally:
            users.pop()
            if not users:
                del self._slots[host]

    async def _wait_for_turn(self, host: str) -> None:
        while (wait_seconds := self._free_at.get(host, 0.0) - time.monotonic()) > 0:
            await asyncio.sleep(wait_seconds)
        self._free_at.pop(host, None)
        if self._delay_seconds:
            self.back_off(host, self._delay_seconds)

    def back_off(self, host: str, seconds: float) -> None:
        """Start no request to a host for `seconds`; never shortens an earlier back-off."""
        now = time.monotonic()
        if len(self._free_at) >= _HOSTS_REMEMBERED:
            self._free_at = {name: at for name, at in self._free_at.items() if at > now}
        self._free_at[host] = max(self._free_at.get(host, 0.0), now + seconds)


class Fetcher:
    """Fetches URLs concurrently within the configured limits. Use as an asynchronous context manager.

    Requests wait while `has_room` is not set. `resolver` replaces the system's name resolution beneath the address
    guard. Raises ThroughlineError if a deny list cannot be read.
    """

    def __init__(
        self, config: FetchConfig, has_room: asyncio.Event | None = None, resolver: AbstractResolver | None = None
    ) -> None:
        self._config = config
        self._has_room = has_room
        self._inner_resolver = resolver
        self._allowed = frozenset(config.allowed_private_hosts)
        self._denials = denials_of(config.opt_outs, config.urls_denied, config.domains_denied)
        self._total_slots = asyncio.Semaphore(config.total_connections)
        self._hosts = HostThrottle(config.connections_per_host, config.host_delay_seconds)
        self._refusals: dict[str, tuple[float, Fetched]] = {}

    async def __aenter__(self) -> Self:
        config = self._config
        connector = aiohttp.TCPConnector(
            resolver=GuardedResolver(self._allowed, self._inner_resolver),
            limit=0,  # the semaphores are the limit, so that waiting for a connection does not count as server time
            ttl_dns_cache=_DNS_CACHE_SECONDS,
            ssl=config.verify_tls,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": config.user_agent, "Accept": _ACCEPT, "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=config.connect_seconds, sock_read=config.read_seconds
            ),
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def fetch(self, url: str) -> Fetched:
        """Return the content of `url`, or the status of its failure; network failures never raise.

        If the server asks for a wait beyond the configured limit, the URL is not requested again until it is over.
        """
        until, refusal = self._refusals.get(url, (0.0, None))
        if refusal is not None and time.monotonic() < until:
            return refusal
        outcome = await self._attempt(url)
        for retry in range(self._config.retries):
            if not self._is_worth_retrying(outcome):
                break
            backoff = self._config.backoff_seconds * 2**retry * random.uniform(0.5, 1.5)
            await asyncio.sleep(max(backoff, outcome.retry_after_seconds or 0.0))
            outcome = await self._attempt(url)
        if outcome.status in RETRYABLE and (outcome.retry_after_seconds or 0.0) > self._config.max_retry_after_seconds:
            self._refusals[url] = (time.monotonic() + (outcome.retry_after_seconds or 0.0), outcome)
        return outcome

    def _is_worth_retrying(self, outcome: Fetched) -> bool:
        if outcome.status not in RETRYABLE:
            return False
        if outcome.status in TIMEOUTS:
            return self._config.retry_timeouts
        return (outcome.retry_after_seconds or 0.0) <= self._config.max_retry_after_seconds

    async def _attempt(self, url: str) -> Fetched:
        """Request once, following redirects here so that each hop passes the same checks as the first."""
        try:
            target = _parse(url)
        except ValueError as error:
            return Fetched(status=FetchStatus.BAD_URL, detail=plain_text(str(error)))
        budget_seconds = self._config.total_seconds
        seen: set[URL] = set()
        while True:
            if target in seen:
                return Fetched(status=FetchStatus.REDIRECT_LOOP, detail=plain_text(f"back to {target}"))
            if len(seen) > self._config.max_redirects:
                detail = f"more than {self._config.max_redirects}"
                return Fetched(status=FetchStatus.TOO_MANY_REDIRECTS, detail=detail)
            denied = self._denied(target, url if not seen else None)
            if denied is not None:
                return denied
            seen.add(target)
            host = target.host or ""
            async with self._hosts.hold(host), self._total_slots:
                if self._has_room is not None:
                    await self._has_room.wait()
                start = time.monotonic()
                result = await self._request(target, budget_seconds)
                budget_seconds -= time.monotonic() - start
            if isinstance(result, Fetched):
                wait_seconds = result.retry_after_seconds or 0.0
                if result.status in RETRYABLE and 0 < wait_seconds <= self._config.max_retry_after_seconds:
                    self._hosts.back_off(host, wait_seconds)
                return result
            target = result

    def _denied(self, target: URL, original: str | None) -> Fetched | None:
        """Return the outcome for a URL on a deny list, or None; `original` is its spelling in the row, if any."""
        if self._denials is None:
            return None
        spellings = {str(target), target.human_repr(), original.strip() if original else str(target)}
        hosts = {(host or "").rstrip(".") for host in (target.host, target.raw_host, f"[{target.host}]")}
        reason = self._denials.reason(spellings, hosts)
        return Fetched(status=FetchStatus(reason), detail=plain_text(f"{target}")) if reason else None

    async def _request(self, target: URL, budget_seconds: float) -> Fetched | URL:
        """Send one request; return its outcome, or the redirect target."""
        host = f"{target.host}:{target.port}"
        try:
            if host not in self._allowed:
                check_literal(target.host or "")
            async with (
                asyncio.timeout(budget_seconds),
                self._session.get(target, allow_redirects=False) as response,
            ):
                return await self._handle_response(response)
        except (aiohttp.ClientError, OSError, ValueError, ssl.SSLError) as error:
            return _error_outcome(error, host)

    async def _handle_response(self, response: aiohttp.ClientResponse) -> Fetched | URL:
        status, code = FetchStatus, response.status

        def outcome(result: FetchStatus, detail: str = "") -> Fetched:
            return Fetched(
                status=result, http_status=code, detail=plain_text(detail), retry_after_seconds=_retry_after(response)
            )

        directive = self._opt_out(response.headers.getall("X-Robots-Tag", ()))
        if directive is not None:
            return outcome(status.OPTED_OUT, f"X-Robots-Tag: {directive}")
        if code in _REDIRECTS:
            location = response.headers.get("Location", "")
            try:
                return _parse(str(response.url.join(URL(location)))) if location else outcome(status.BAD_REDIRECT)
            except ValueError as error:
                return outcome(status.BAD_REDIRECT, f"{error}")
        if code == 200:
            return await self._read(response, outcome)
        if code in (404, 410):
            return outcome(status.HTTP_NOT_FOUND)
        if code in (401, 402, 403, 407, 451):
            return outcome(status.HTTP_FORBIDDEN)
        if code == 429:
            return outcome(status.HTTP_TOO_MANY_REQUESTS)
        if 400 <= code < 500:
            return outcome(status.HTTP_CLIENT_ERROR)
        return outcome(status.HTTP_SERVER_ERROR if 500 <= code < 600 else status.HTTP_UNEXPECTED)

    def _opt_out(self, headers: Iterable[str]) -> str | None:
        """Return the directive with which a server opts out, or None.

        An agent name before a colon applies to the directives after it, up to the next name in the same header, as in
        ``X-Robots-Tag: somebot: noai, noimageai``.
        """
        agents = {None, self._config.opt_out_agent.lower() if self._config.opt_out_agent else None}
        for header in headers:
            agent = None
            for item in header.lower().split(","):
                name, colon, rest = item.partition(":")
                agent, directive = (name.strip(), rest) if colon else (agent, item)
                if agent in agents and directive.strip() in self._config.opt_out_directives:
                    return directive.strip()
        return None

    async def _read(self, response: aiohttp.ClientResponse, outcome: Callable[..., Fetched]) -> Fetched:
        """Read and decompress the body within the size limit."""
        limit = self._config.max_body_bytes
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        if encoding not in _INFLATE_WINDOW:
            return outcome(FetchStatus.BAD_CONTENT_ENCODING, encoding)
        window = _INFLATE_WINDOW[encoding]
        if window is None and (response.content_length or 0) > limit:
            return outcome(FetchStatus.BODY_TOO_LARGE, f"more than {limit} bytes")
        inflate = zlib.decompressobj(window) if window is not None else None
        body = bytearray()
        async for chunk in response.content.iter_any():
            if inflate is None:
                body += chunk
            else:
                try:
                    body += inflate.decompress(chunk, limit + 1 - len(body))
                except zlib.error as error:
                    return outcome(FetchStatus.BAD_CONTENT_ENCODING, f"{encoding}: {error}")
            if len(body) > limit:
                return outcome(FetchStatus.BODY_TOO_LARGE, f"more than {limit} bytes")
        if inflate is not None and not inflate.eof:
            return outcome(FetchStatus.BAD_CONTENT_ENCODING, f"{encoding}: ends early")
        if not body:
            return outcome(FetchStatus.BODY_EMPTY)
        content_type = response.headers.get("Content-Type")
        return Fetched(
            status=FetchStatus.OK,
            http_status=response.status,
            body=bytes(body),
            content_type=plain_text(content_type) if content_type is not None else None,
            final_url=plain_text(str(response.url)),
        )


def _parse(url: str) -> URL:
    """Return an HTTP URL without user name, password and fragment; raises ValueError for anything else."""
    target = URL(url.strip())
    if target.scheme not in ("http", "https"):
        raise ValueError(f"scheme {target.scheme or 'missing'!r} is not http or https")
    if not target.host:
        raise ValueError("no host")
    return target.with_user(None).with_fragment(None)


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    """Return the seconds a server asks to wait, or None if the header is missing or invalid."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _error_outcome(error: Exception, host: str) -> Fetched:
    """Return the status for an exception of a request; details name causes, never attempts or times."""
    status = FetchStatus

    def outcome(result: FetchStatus, detail: str) -> Fetched:
        return Fetched(status=result, detail=plain_text(detail))

    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    match error:
        case _ if isinstance(cause, BlockedAddressError):
            return outcome(status.BLOCKED_ADDRESS, str(cause))
        case aiohttp.ClientConnectorDNSError():
            return outcome(status.DNS_ERROR, f"{host}: name not resolved")
        case aiohttp.ClientSSLError() | ssl.SSLError() | ssl.CertificateError():
            return outcome(status.TLS_ERROR, f"{host}: {getattr(cause, 'reason', None) or type(cause).__name__}")
        case aiohttp.ConnectionTimeoutError():
            return outcome(status.CONNECT_TIMEOUT, host)
        case aiohttp.SocketTimeoutError():
            return outcome(status.READ_TIMEOUT, host)
        case TimeoutError():
            return outcome(status.TOTAL_TIMEOUT, host)
        case aiohttp.InvalidURL():
            return outcome(status.BAD_URL, str(error))
        case aiohttp.ClientConnectorError():
            return outcome(status.CONNECT_ERROR, f"{host}: {_errno_name(cause)}")
        case aiohttp.ClientPayloadError():
            return outcome(status.BODY_INCOMPLETE, host)
        case aiohttp.ClientResponseError():
            return outcome(status.BAD_HTTP, f"{host}: {error.message.splitlines()[0] if error.message else ''}")
        case aiohttp.ClientConnectionError() | OSError():
            return outcome(status.DISCONNECTED, host)
        case UnicodeError():
            return outcome(status.BAD_URL, f"{host}: not a host name")
        case _:
            return outcome(status.BAD_HTTP, f"{host}: {type(error).__name__}")


def _errno_name(error: Exception) -> str:
    return errno.errorcode.get(getattr(error, "errno", None) or 0, type(error).__name__).lower()
