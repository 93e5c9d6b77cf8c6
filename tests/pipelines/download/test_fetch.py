"""Every kind of answer, good or hostile, gets its status."""

import time
from pathlib import Path

import pytest

from pipelines.core.errors import ThroughlineError
from pipelines.download.config import ImageTransform
from pipelines.download.decode import decode
from pipelines.download.fetch import Fetcher
from pipelines.download.status import FetchStatus
from tests.pipelines.download.fetching import AskedResolver, NoResolver, config_for, fetch_all, lists_for
from tests.pipelines.download.hostile_server import JPEG, HostileServer
from tests.pipelines.download.polite_server import PoliteServer, self_signed

TRANSFORM = ImageTransform(min_source_side_px=8, max_source_aspect=10)


# path -> status after download and decoding
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


def test_every_hostile_response_gets_its_status_and_affects_no_other(server: HostileServer, tmp_path: Path) -> None:
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


def test_unresolvable_names_and_servers_without_tls(server: HostileServer) -> None:
    unknown, plain = fetch_all(
        config_for(server), ["http://nowhere.example/x.jpg", f"https://{server.host}/jpeg"], NoResolver([])
    )
    assert (unknown.status, unknown.detail) == (FetchStatus.DNS_ERROR, "nowhere.example:80: name not resolved")
    assert plain.status == FetchStatus.TLS_ERROR
    assert server.host in plain.detail


def test_denied_urls_are_neither_requested_nor_resolved(server: HostileServer, tmp_path: Path) -> None:
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


def test_a_changed_list_stops_the_download_before_it_begins(server: HostileServer, tmp_path: Path) -> None:
    lists = lists_for(server, tmp_path)
    (tmp_path / "urls.txt").write_text("another\n")
    with pytest.raises(ThroughlineError, match=r"urls.txt: SHA-256 .* the list has changed, set its new digest"):
        Fetcher(config_for(server, **lists))


def test_an_untrusted_certificate_is_rejected_unless_verification_is_off(tmp_path: Path) -> None:
    with PoliteServer(self_signed(tmp_path / "server.pem")) as polite:
        (refused,) = fetch_all(config_for(polite), [polite.url("/a")])
        assert (refused.status, polite.num_requests) == (FetchStatus.TLS_ERROR, 0)
        assert "CERTIFICATE_VERIFY_FAILED" in refused.detail
        (taken,) = fetch_all(config_for(polite, verify_tls=False), [polite.url("/a")])
        assert (taken.status, taken.body, taken.final_url) == (FetchStatus.OK, JPEG, polite.url("/a"))
