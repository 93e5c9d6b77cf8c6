"""Guard against server-side request forgery: downloads connect only to public addresses and configured hosts.

The check is part of the resolver, so that the checked addresses are exactly those connected to, and no second DNS
answer can replace them. Literal addresses never reach a resolver; `check_literal` checks them.
"""

import socket
from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

# RFC 6890 and the IANA special-purpose registries; listed here because `ipaddress.is_global` depends on the Python
# version.
_BLOCKED_V4 = {
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private",
    "100.64.0.0/10": "shared address space",
    "127.0.0.0/8": "loopback",
    "169.254.0.0/16": "link-local, cloud metadata",
    "172.16.0.0/12": "private",
    "192.0.0.0/24": "protocol assignments",
    "192.0.2.0/24": "documentation",
    "192.31.196.0/24": "AS112",
    "192.52.193.0/24": "AMT",
    "192.88.99.0/24": "6to4 relay",
    "192.168.0.0/16": "private",
    "192.175.48.0/24": "AS112",
    "198.18.0.0/15": "benchmarking",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved, broadcast",
    "168.63.129.16/32": "cloud metadata",
}
_BLOCKED_V6 = {
    "2001::/23": "protocol assignments",
    "2001:db8::/32": "documentation",
    "3fff::/20": "documentation",
}
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_RANGES_V4 = [(IPv4Network(network), name) for network, name in _BLOCKED_V4.items()]
_RANGES_V6 = [(IPv6Network(network), name) for network, name in _BLOCKED_V6.items()]


class BlockedAddressError(OSError):
    """A host resolves to a blocked address; an OSError, as resolvers raise."""


def blocked_range(address: IPv4Address | IPv6Address) -> str | None:
    """Return the name of the blocked range that contains `address`, or None for a public unicast address.

    For an IPv6 address that embeds an IPv4 address (mapped, 6to4, NAT64), the embedded one is checked.
    """
    if isinstance(address, IPv4Address):
        return next((name for network, name in _RANGES_V4 if address in network), None)
    if address.ipv4_mapped is not None:
        return blocked_range(address.ipv4_mapped)
    if address.sixtofour is not None:
        return blocked_range(address.sixtofour)
    if address in _NAT64:
        return blocked_range(IPv4Address(int(address) & 0xFFFFFFFF))
    if address not in _GLOBAL_UNICAST:
        return "multicast" if address.is_multicast else "loopback" if address.is_loopback else "not global unicast"
    return next((name for network, name in _RANGES_V6 if address in network), None)


def check_literal(host: str) -> None:
    """Raise BlockedAddressError if `host` is a blocked address; names pass, because the resolver checks them."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return
    _refuse(host, address)


def _refuse(host: str, address: IPv4Address | IPv6Address) -> None:
    name = blocked_range(address)
    if name is not None:
        raise BlockedAddressError(f"{host} is {address} ({name})")


class GuardedResolver(AbstractResolver):
    """Resolves a host with `inner` and rejects it if any of its addresses is blocked.

    One blocked address among public ones is enough: public images are not served from names that also resolve to
    internal addresses. `allowed` contains exempt ``host:port`` pairs.
    """

    def __init__(self, allowed: Collection[str], inner: AbstractResolver | None = None) -> None:
        self._allowed = frozenset(allowed)
        self._inner = inner or ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        results = await self._inner.resolve(host, port, family)
        if f"{host}:{port}" not in self._allowed:
            for result in results:
                _refuse(host, ip_address(result["host"].partition("%")[0]))
        return results

    async def close(self) -> None:
        await self._inner.close()
