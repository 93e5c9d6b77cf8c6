"""Resolves URLs, domains and sample keys to rows, and searches outputs for them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.core.errors import ThroughlineError
from pipelines.laion.block_lists import DomainSet, OptOuts, hash_set, hosts_of
from pipelines.runner.outputs import StageOutput
from pipelines.runner.rows import FoundRow, table_batches, table_names

if TYPE_CHECKING:
    import pyarrow as pa

UNREADABLE = (ThroughlineError, OSError, ValueError, KeyError)
"""Errors of an output that cannot be searched."""
OutputId = tuple[str, str]
"""Stage and data version."""


def id_of(output: StageOutput) -> OutputId:
    """Return the stage and data version of an output."""
    return output.manifest.stage, output.data_version


@dataclass(frozen=True)
class TracedRow:
    """A row as it was given its key; URL and alt-text are empty if no source table has it any more."""

    sample_key: str
    url: str = ""
    alt_text: str = ""


class ResolvedRows:
    """The rows that some entries name, found by reading each source table once."""

    def __init__(self, entries: OptOuts, sources: Iterable[tuple[StageOutput, str]]) -> None:
        """Read the tables of `sources`, pairs of an output and the prefix of its tables."""
        self.rows = {key: TracedRow(key) for key in entries.keys}
        self.matched: set[str] = set()
        """URLs and domains that match at least one row."""
        self._found: dict[OutputId, list[FoundRow]] = {}
        self._errors: dict[OutputId, Exception] = {}
        self._keys, self._urls = hash_set(entries.keys), hash_set(entries.urls)
        self._domains = DomainSet(entries.domains) if entries.domains else None
        for output, prefix in sources:
            found = self._found[id_of(output)] = []
            try:
                found.extend(self._search(output, prefix))
            except UNREADABLE as error:
                self._errors[id_of(output)] = error

    def find(self, source: StageOutput) -> Iterator[FoundRow]:
        """Yield the rows of a source output; raises the error that ended its search, if any."""
        yield from self._found[id_of(source)]
        if id_of(source) in self._errors:
            raise self._errors[id_of(source)]

    def _search(self, output: StageOutput, prefix: str) -> Iterator[FoundRow]:
        for batch in table_batches(output, table_names(output, prefix), ["sample_key", "url", "alt_text"]):
            mask = self._keys.contains(batch["sample_key"]) | self._urls.contains(batch["url"])
            if self._domains is not None:
                hosts = hosts_of(batch["url"])
                mask |= self._domains.contains_hosts(hosts)
                self.matched.update(
                    entry for host in hosts.dictionary.to_pylist() for entry in self._domains.entries_with(host)
                )
            for row in _masked(batch, mask):
                self.rows[row["sample_key"]] = TracedRow(row["sample_key"], row["url"], row["alt_text"])
                self.matched.add(row["url"])
                yield FoundRow(row["sample_key"], row["file"], {})


class KeySearch:
    """A search for sample keys through outputs, upstream first: implements `pipelines.runner.rows.RowSearch`."""

    def __init__(
        self, keys: Iterable[str], outputs: Iterable[StageOutput], unsearchable: Iterable[OutputId],
        rowless_stages: Iterable[str],
    ) -> None:  # fmt: skip
        self.keys = {key: key for key in keys}
        """Maps each key to its one shared string, however many outputs hold it."""
        self.holding: dict[OutputId, StageOutput] = {}
        """Outputs found so far that hold wanted rows, or were made from one that does."""
        self.unsearchable = set(unsearchable)
        """Outputs that could not be searched."""
        self._wanted = hash_set(self.keys)
        self._known = {id_of(output) for output in outputs}
        self._rowless_stages = frozenset(rowless_stages)

    def rows(self, output: StageOutput, prefix: str, columns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Yield the wanted rows of the tables whose names begin with `prefix`: sample_key, `columns` and file."""
        for batch in table_batches(output, table_names(output, prefix), ["sample_key", *columns]):
            yield from _masked(batch, self._wanted.contains(batch["sample_key"]))

    def holding_inputs(self, output: StageOutput) -> Iterator[StageOutput]:
        """Yield the inputs of an output in which wanted rows were found."""
        for input_id in self._inputs(output):
            if input_id in self.holding:
                yield self.holding[input_id]

    def lost_inputs(self, output: StageOutput) -> list[OutputId]:
        """Return the inputs of an output that could not be searched, or no longer exist."""
        return [item for item in self._inputs(output) if item in self.unsearchable or item not in self._known]

    def may_hold(self, output: StageOutput) -> bool:
        """Return whether an output may hold wanted rows, judged by its inputs."""
        return bool(self.lost_inputs(output)) or next(self.holding_inputs(output), None) is not None

    def _inputs(self, output: StageOutput) -> list[OutputId]:
        """Return the inputs of an output that may have rows. Single-file inputs are entries of an index or a
        selection, whose rows are in other inputs too."""
        refs = (ref for refs in output.manifest.inputs.values() for ref in refs)
        return [
            (ref.stage, ref.data_version) for ref in refs if ref.file is None and ref.stage not in self._rowless_stages
        ]


def _masked(batch: "pa.RecordBatch", mask: Any) -> list[dict[str, Any]]:
    import pyarrow as pa

    return batch.filter(pa.array(mask)).to_pylist() if mask.any() else []
