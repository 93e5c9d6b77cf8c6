"""Lists of URLs, domains and sample keys (text files, one entry per line), and membership tests against them.

Entries are stored as 128-bit hashes, so that an opt-out list of many millions takes 16 bytes per entry.
"""

import string
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core.digest import file_sha256
from pipelines.core.errors import ThroughlineError
from pipelines.core.sample_key import SAMPLE_KEY_BYTES

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from pipelines.laion.config import EntryList


def read_entries(entries: "EntryList") -> tuple[str, ...]:
    """Return the entries of a list file, without blank lines and lines that begin with ``#``.

    Raises ThroughlineError where the file is missing, is not UTF-8, or has another digest than the configuration says.
    """
    path = Path(entries.path)
    try:
        data = path.read_bytes()
        lines = data.decode().splitlines()
    except OSError as error:
        raise ThroughlineError(f"{path}: the list can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ThroughlineError(f"{path}: the list is not UTF-8 text (byte {error.start})") from error
    found = file_sha256(path)
    if found != entries.sha256:
        raise ThroughlineError(
            f"{path}: SHA-256 {found[:12]}..., the configuration says {entries.sha256[:12]}...; the list has "
            "changed, set its new digest"
        )
    return tuple(line for item in lines if (line := item.strip()) and not line.startswith("#"))


class HashSet:
    """A set of strings, stored as sorted 128-bit hashes, with vectorised lookup."""

    def __init__(self, values: "pa.Array") -> None:
        from pipelines.laion.hashes import string_hashes

        hashes = string_hashes(values)
        self._first, self._second = hashes[hashes[:, 0].argsort()].T.copy()

    def __len__(self) -> int:
        return len(self._first)

    def contains(self, values: "pa.Array") -> "np.ndarray":
        """Return a mask of the strings in the set; null is never in it."""
        import numpy as np

        from pipelines.laion.hashes import string_hashes

        if not len(self._first):
            return np.zeros(len(values), bool)
        hashes = string_hashes(values)
        place = np.searchsorted(self._first, hashes[:, 0]).clip(max=len(self._first) - 1)
        inside = (self._first[place] == hashes[:, 0]) & (self._second[place] == hashes[:, 1])
        return inside & values.is_valid().to_numpy(zero_copy_only=False)


def hash_set(entries: Iterable[str]) -> HashSet:
    """Return the entries as a set."""
    import pyarrow as pa

    return HashSet(pa.array(entries, pa.string()))


class DomainSet:
    """A set of domains; it contains a host if it contains the host or a parent domain."""

    def __init__(self, domains: tuple[str, ...]) -> None:
        self._entries = {item.lower().strip("."): item for item in domains}

    def entries_with(self, host: str) -> Iterator[str]:
        """Yield the entries, as they were given, that match a host."""
        while host:
            if host in self._entries:
                yield self._entries[host]
            host = host.partition(".")[2]

    def contains_host(self, host: str) -> bool:
        return next(self.entries_with(host), None) is not None

    def contains(self, urls: "pa.Array") -> "np.ndarray":
        """Return a mask of the URLs whose host is in the set; a URL without a host never is."""
        return self.contains_hosts(hosts_of(urls))

    def contains_hosts(self, hosts: "pa.DictionaryArray") -> "np.ndarray":
        """Return a mask of the hosts, as `hosts_of` returns them, in the set."""
        import numpy as np

        known = np.fromiter(map(self.contains_host, hosts.dictionary.to_pylist()), bool, len(hosts.dictionary))
        if not len(known):
            return np.zeros(len(hosts), bool)
        places = hosts.indices.fill_null(0).to_numpy(zero_copy_only=False)
        return known[places] & hosts.is_valid().to_numpy(zero_copy_only=False)


def hosts_of(urls: "pa.Array") -> "pa.DictionaryArray":
    """Return the hosts of http and https URLs, lower case, without user, port and trailing dot, or null."""
    import pyarrow.compute as pc

    pattern = r"^(?i:https?)://(?:[^/?#@]*@)*(?P<host>\[[^\]/?#]*\]|[^/?#:@\s]+)"
    found = pc.struct_field(pc.extract_regex(urls, pattern), "host")
    return pc.utf8_rtrim(pc.utf8_lower(found), ".").dictionary_encode()


@dataclass(frozen=True)
class OptOuts:
    """The entries of an opt-out list by type: sample keys, image URLs, domains."""

    keys: tuple[str, ...]
    """32 hexadecimal digits each, lower case."""
    urls: tuple[str, ...]
    domains: tuple[str, ...]

    @classmethod
    def read(cls, entries: "EntryList | None") -> "OptOuts":
        """Raises ThroughlineError where the list file can't be read."""
        return cls.of(read_entries(entries) if entries else ())

    @classmethod
    def of(cls, entries: Iterable[str]) -> "OptOuts":
        """Sort entries by type."""
        keys, urls, domains = [], [], []
        for entry in entries:
            if "://" in entry:
                urls.append(entry)
            elif len(entry) == 2 * SAMPLE_KEY_BYTES and all(digit in string.hexdigits for digit in entry):
                keys.append(entry.lower())
            else:
                domains.append(entry)
        return cls(tuple(keys), tuple(urls), tuple(domains))


def read_keys(entries: "EntryList | None") -> frozenset[str]:
    """Return the sample keys of a list, none where there is no list.

    Raises ThroughlineError as `read_entries` does, and where an entry is anything but a sample key.
    """
    named = OptOuts.read(entries)
    for other in (*named.urls, *named.domains):
        assert entries is not None
        raise ThroughlineError(
            f"{entries.path}: {other!r} is not a sample key, and this list can hold nothing else; write it with "
            "`throughline withdraw`, which resolves URLs and domains to sample keys"
        )
    return frozenset(named.keys)


class Denials:
    """Checks a URL against the deny lists before each request of a download."""

    def __init__(
        self, opt_outs: "EntryList | None", urls_denied: "EntryList | None", domains_denied: "EntryList | None"
    ) -> None:
        """Raises ThroughlineError where a list file can't be read."""
        out = OptOuts.read(opt_outs)
        urls, domains = (read_entries(item) if item else () for item in (urls_denied, domains_denied))
        self._urls = {"opted_out": hash_set(out.urls), "url_denied": hash_set(urls)}
        self._domains = {"opted_out": DomainSet(out.domains), "domain_denied": DomainSet(domains)}

    def reason(self, spellings: Collection[str], hosts: Collection[str]) -> str | None:
        """Return ``opted_out``, ``url_denied`` or ``domain_denied``, or None for a URL that may be requested.

        `spellings` are equivalent forms of the URL, `hosts` of its host; one listed form suffices.
        """
        import pyarrow as pa

        for word in ("opted_out", "url_denied", "domain_denied"):
            urls, domains = self._urls.get(word), self._domains.get(word)
            if urls is not None and len(urls) and urls.contains(pa.array(list(spellings), pa.string())).any():
                return word
            if domains is not None and any(map(domains.contains_host, hosts)):
                return word
        return None


@lru_cache(maxsize=2)
def denials_of(
    opt_outs: "EntryList | None", urls_denied: "EntryList | None", domains_denied: "EntryList | None"
) -> Denials | None:
    """Return the checks of these lists, None without lists; cached, so that a process reads them once."""
    lists = (opt_outs, urls_denied, domains_denied)
    return Denials(*lists) if any(lists) else None
