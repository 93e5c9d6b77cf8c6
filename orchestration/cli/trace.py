"""The commands `throughline trace`, which finds the outputs that used rows, and `throughline withdraw`, which excludes
rows from training."""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.cli.options import add_json_argument, add_profile_arguments, load_execution
from pipelines.core.errors import ThroughlineError

if TYPE_CHECKING:
    from orchestration.graph.resolution import Plan
    from orchestration.lineage.trace import Trace, TracedOutput
    from pipelines.laion.config import EntryList

_SHOWN_ROWS = 5
_SHOWN_FILES = 2
_TEXT_CHARS = 50


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `trace`."""
    _add_row_arguments(parser)
    add_json_argument(parser)


def add_withdraw_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `withdraw`."""
    _add_row_arguments(parser)
    parser.add_argument(
        "--list", dest="list_file", type=Path, metavar="FILE",
        help="the list of withdrawn rows to extend; default: the profile's, dataset.withdrawn",
    )  # fmt: skip
    add_json_argument(parser)


def _add_row_arguments(parser: argparse.ArgumentParser) -> None:
    add_profile_arguments(parser)
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help="a sample key, a URL, or a domain, which includes its subdomains"
    )
    parser.add_argument("--from", dest="file", type=Path, metavar="FILE", help="read more of them, one per line")


def run_trace(arguments: argparse.Namespace) -> int:
    """Print the outputs that used rows; return 1 if some outputs could not be read.

    Raises ThroughlineError if no row is named.
    """
    found = _find_rows(arguments, load_execution(arguments).plan)
    if arguments.json:
        print(json.dumps(found.as_json(), indent=1, ensure_ascii=False))
    else:
        print("\n".join(trace_lines(found)))
    return _exit_status(found)


def run_withdraw(arguments: argparse.Namespace) -> int:
    """Print the outputs that used rows, add the rows' keys to the list, and print the effect; returns as `run_trace`.

    Raises ThroughlineError if no output contains any of the rows, or if the list is invalid.
    """
    from pipelines.storage.mirror import location_of

    plan = load_execution(arguments).plan
    path = _list_path(arguments, plan)
    found = _find_rows(arguments, plan)
    if not found.rows:
        raise ThroughlineError(
            f"no output in {location_of(plan.output_root)} contains a row of "
            f"{', '.join(map(_plain, found.unknown[:3]))}; nothing was withdrawn. URLs must equal those of the "
            "metadata byte for byte"
        )
    num_new, digest, num_listed = _extend_list(path, found, plan.profile.dataset.withdrawn)
    change = {"path": str(path.absolute()), "sha256": digest}
    recomputed = _recomputed(plan) if num_new else {}
    if arguments.json:
        record = {"withdrawn": {**change, "num_new": num_new, "num_listed": num_listed}, "made_anew": recomputed}
        print(json.dumps(found.as_json() | record, indent=1, ensure_ascii=False))
        return _exit_status(found)
    print("\n".join(trace_lines(found)))
    print(f"\n{path}: {_count(num_new, 'row')} added, {num_listed:,} in total. A profile that contains")
    print(f'\n    [dataset]\n    withdrawn = {{ path = {json.dumps(change["path"])}, sha256 = "{digest}" }}\n')
    if recomputed:
        print("trains on none of them; its next run recomputes only:")
        print("    " + ", ".join(f"{name} ({count})" if count > 1 else name for name, count in recomputed.items()))
    else:
        print("trains on none of them.")
    print("Existing outputs are unchanged: those listed above contain the rows until their folders are deleted.")
    if found.unreadable:
        print("Some outputs could not be read, so the list may lack rows.")
    return _exit_status(found)


def _exit_status(found: "Trace") -> int:
    return 1 if found.unreadable else 0


def _find_rows(arguments: argparse.Namespace, plan: "Plan") -> "Trace":
    from orchestration.graph.resolution import INDEX
    from orchestration.lineage.trace import Outputs, trace
    from pipelines.core.progress import Progress
    from pipelines.laion.block_lists import read_entries
    from pipelines.laion.sources import scan_entry_list

    entries = list(arguments.rows)
    if arguments.file is not None:
        entries += read_entries(scan_entry_list(arguments.file))
    if not entries:
        raise ThroughlineError("name at least one row: a sample key, a URL or a domain, or a file of them with --from")
    outputs = Outputs.load(plan.output_root)
    # Without an index no other output of the graph can be found, and all would be marked old.
    refs = [task.output.ref for task in plan.all_tasks() if task.output is not None]
    current = outputs.in_use(refs) if plan.task(INDEX).output is not None else None
    with Progress("trace", len(outputs), "outputs") as progress:
        return trace(outputs, list(dict.fromkeys(entries)), current, progress.advance)


def _list_path(arguments: argparse.Namespace, plan: "Plan") -> Path:
    """Return the list to extend; raises ThroughlineError if none is named, or if the profile has another one."""
    configured = plan.profile.dataset.withdrawn
    if arguments.list_file is None:
        if configured is None:
            raise ThroughlineError("the profile has no list of withdrawn rows yet; name one: --list withdrawn.txt")
        return Path(configured.path)
    chosen = Path(arguments.list_file)
    if configured is not None and Path(configured.path).resolve() != chosen.resolve():
        raise ThroughlineError(
            f"the profile's list of withdrawn rows is {configured.path}, and a data set has only one; omit --list, or "
            "the rows of that list would return"
        )
    return chosen


def _extend_list(path: Path, found: "Trace", configured: "EntryList | None") -> tuple[int, str, int]:
    """Append the rows that the list lacks, each below its URL; return how many, the list's digest and its size.

    Raises ThroughlineError if it is not a text file, or is neither the list of `configured` nor that list with lines
    appended.
    """
    from pipelines.core.atomic import exclusive, write_bytes
    from pipelines.laion.block_lists import read_keys
    from pipelines.laion.sources import scan_entry_list

    if path.exists() and not path.is_file():
        raise ThroughlineError(f"{path}: not a file; name a text file for the list of withdrawn rows")
    with exclusive(path.with_name(f".{path.name}.lock")):
        before = path.read_bytes() if path.exists() else b""
        if configured is not None and not is_append_only_edit(before, configured.sha256):
            raise ThroughlineError(
                f"{path}: expected the list that the profile names (SHA-256 {configured.sha256[:12]}...), or that list "
                f"with lines appended, found {'another one' if before else 'none'}; rows on that list would return to "
                "the data set. Restore it, or name the present list in the profile"
            )
        listed = read_keys(scan_entry_list(path)) if before else frozenset()
        new = [row for key, row in found.rows.items() if key not in listed]
        lines = [line for row in new for line in ([f"# {_plain(row.url)}"] if row.url else []) + [row.sample_key]]
        gap = b"\n" if before and not before.endswith(b"\n") else b""
        if new:
            write_bytes(path, before + gap + "".join(f"{line}\n" for line in lines).encode())
        return len(new), scan_entry_list(path).sha256, len(listed) + len(new)


def is_append_only_edit(data: bytes, sha256: str) -> bool:
    """Return whether bytes, or some first lines of them, have this digest."""
    digest = hashlib.sha256()
    if digest.hexdigest() == sha256:
        return True
    for line in data.splitlines(keepends=True):
        without_end = digest.copy()
        without_end.update(line.rstrip(b"\r\n"))
        digest.update(line)
        if sha256 in (digest.hexdigest(), without_end.hexdigest()):
            return True
    return False


def _recomputed(plan: "Plan") -> dict[str, int]:
    """Return the assets that a longer list invalidates, with the number of their partitions."""
    readers = {name for name, node in plan.graph.nodes.items() if "withdrawn" in node.stage.config_type.model_fields}
    names = plan.graph.downstream(readers)
    return {name: len(plan.partitions(name)) for name in plan.graph.nodes if name in names}


def trace_lines(found: "Trace") -> Iterator[str]:
    """Yield the trace as text: rows, a line per output that contains some, and the outputs derived from those."""
    from orchestration.console import table

    yield f"{_count(len(found.rows), 'row')}" + (":" if found.rows else ", so there is nothing to report")
    for row in list(found.rows.values())[:_SHOWN_ROWS]:
        text = row.alt_text if len(row.alt_text) <= _TEXT_CHARS else row.alt_text[: _TEXT_CHARS - 3] + "..."
        yield f"  {row.sample_key}  {_plain(row.url) or '(no longer in any subset)'}  {_plain(text)}".rstrip()
    if len(found.rows) > _SHOWN_ROWS:
        yield f"  and {len(found.rows) - _SHOWN_ROWS:,} more (--json lists all)"
    for entry in found.unknown:
        yield f"  {_plain(entry)}: no output contains a matching row"
    with_rows = [holder for holder in found.holders if holder.keys]
    if with_rows:
        yield ""
        cells = [("", "output", "data version", "rows", "where")]
        cells += [
            ("old" if holder.is_current is False else "", holder.label, holder.output.data_version[:12],
             f"{len(holder.keys):,}", _where(holder))
            for holder in with_rows
        ]  # fmt: skip
        yield table(cells, "  ")
    derived = Counter((holder.stage, _age(holder)) for holder in found.holders if not holder.keys)
    if derived:
        yield ""
        yield f"  derived from these: {', '.join(f'{stage} ({count}{age})' for (stage, age), count in derived.items())}"
    dropped = Counter((drop.holder.label, _age(drop.holder), drop.reason) for drop in found.drops)
    if dropped:
        yield ""
        drops = [f"{count:,} by {label}{age} ({reason})" for (label, age, reason), count in dropped.items()]
        yield f"  dropped: {', '.join(drops)}"
    if any(holder.is_current is None for holder in found.holders):
        yield ""
        yield "  Unknown which of these the profile uses: its index is not finished, or its metadata is unreachable."
    if found.unreadable:
        yield ""
        yield from (f"  could not be read: {problem}" for problem in found.unreadable)


def _age(holder: "TracedOutput") -> str:
    return " old" if holder.is_current is False else ""


def _plain(text: str) -> str:
    """Return text from the web on one line, with control characters escaped."""
    return text if text.isprintable() else json.dumps(text)


def _where(holder: "TracedOutput") -> str:
    """Return how an output uses its rows: how often training drew them, their splits, or the files with them."""
    if holder.first_step is not None:
        return f"drawn {_count(holder.times_drawn, 'time')}, first in step {holder.first_step}"
    if holder.splits:
        return ", ".join(f"{count:,} {split}" for split, count in sorted(holder.splits.items()))
    names = sorted(holder.files)
    more = f" and {len(names) - _SHOWN_FILES:,} more" if len(names) > _SHOWN_FILES else ""
    return ", ".join(names[:_SHOWN_FILES]) + more


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
