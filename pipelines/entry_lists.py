"""Lists of URLs, domains and sample keys in text files of one entry per line, and the question whether a row is in one.

An entry is kept as a 128-bit hash, so that an opt-out list of many millions costs 16 bytes an entry.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.digest import file_sha256
from pipelines.errors import ThroughlineError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from pipelines.stage_configs import EntryList


def read_entries(entries: "EntryList") -> tuple[str, ...]:
    """Return the entries of a list file: blank lines and lines that begin with ``#`` are left out.

    Raises ThroughlineError where the file is gone, is not UTF-8, or is not the file that the configuration names.
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
            f"{path}: SHA-256 {found[:12]}..., the configuration names {entries.sha256[:12]}...; the list was changed, "
            "name it again"
        )
    return tuple(line for item in lines if (line := item.strip()) and not line.startswith("#"))


class HashSet:
    """A set of strings by 128-bit hash, sorted; `contains` asks for a whole array at once."""

    def __init__(self, values: "pa.Array") -> None:
        from pipelines.row_hashes import string_hashes

        hashes = string_hashes(values)
        self._first, self._second = hashes[hashes[:, 0].argsort()].T.copy()

    def __len__(self) -> int:
        return len(self._first)

    def contains(self, values: "pa.Array") -> "np.ndarray":
        """Return a mask of the strings that are in the set; null is in none."""
        import numpy as np

        from pipelines.row_hashes import string_hashes

        if not len(self._first):
            return np.zeros(len(values), bool)
        hashes = string_hashes(values)
        place = np.searchsorted(self._first, hashes[:, 0]).clip(max=len(self._first) - 1)
        inside = (self._first[place] == hashes[:, 0]) & (self._second[place] == hashes[:, 1])
        return inside & values.is_valid().to_numpy(zero_copy_only=False)


class DomainSet:
    """A set of domains; a host is in it if it or any domain above it is."""

    def __init__(self, domains: tuple[str, ...]) -> None:
        self._domains = frozenset(item.lower().strip(".") for item in domains)

    def contains_host(self, host: str) -> bool:
        while host:
            if host in self._domains:
                return True
            host = host.partition(".")[2]
        return False

    def contains(self, urls: "pa.Array") -> "np.ndarray":
        """Return a mask of the URLs whose host is in the set; what has no host is in none."""
        import numpy as np

        hosts = hosts_of(urls)
        known = np.fromiter(map(self.contains_host, hosts.dictionary.to_pylist()), bool, len(hosts.dictionary))
        if not len(known):
            return np.zeros(len(urls), bool)
        places = hosts.indices.fill_null(0).to_numpy(zero_copy_only=False)
        return known[places] & hosts.is_valid().to_numpy(zero_copy_only=False)


def hosts_of(urls: "pa.Array") -> "pa.DictionaryArray":
    """Return the hosts of http and https URLs, lower case, without user, port and final dot; null for no host."""
    import pyarrow.compute as pc

    pattern = r"^(?i:https?)://(?:[^/?#@]*@)*(?P<host>\[[^\]/?#]*\]|[^/?#:@\s]+)"
    found = pc.struct_field(pc.extract_regex(urls, pattern), "host")
    return pc.utf8_rtrim(pc.utf8_lower(found), ".").dictionary_encode()
