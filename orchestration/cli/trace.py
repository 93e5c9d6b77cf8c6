"""The commands `throughline trace`, which tells where rows went, and `throughline withdraw`, which takes them out."""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.core.errors import ThroughlineError

if TYPE_CHECKING:
    from orchestration.graph.resolution import Plan
    from orchestration.lineage.trace import Trace, TracedOutput
    from pipelines.laion.config import EntryList

_SHOWN_ROWS = 5
_SHOWN_FILES = 2
_TEXT_CHARS = 50


def add_arguments(parser: argparse.ArgumentParser, *, withdraws: bool) -> None:
    """Declare a command's arguments, the profile's apart; imports nothing heavy."""
    parser.add_argument("rows", nargs="*", metavar="ROW", help="a sample key, a URL, or a domain with all below it")
    parser.add_argument("--from", dest="file", type=Path, metavar="FILE", help="more of them, one a line")
    if withdraws:
        parser.add_argument(
            "--list", dest="list_file", type=Path, metavar="FILE",
            help="the list of withdrawn rows, which grows; default: the profile's, dataset.withdrawn",
        )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="as JSON")


def run_trace(arguments: argparse.Namespace, plan: "Plan") -> int:
    """Print where rows went, and return 1 where something could not be asked.

    Raises ThroughlineError where no row is named.
    """
    found = _look(arguments, plan)
    if arguments.json:
        print(json.dumps(found.as_json(), indent=1, ensure_ascii=False))
    else:
        print("\n".join(trace_lines(found)))
    return _status(found)


def run_withdraw(arguments: argparse.Namespace, plan: "Plan") -> int:
    """Print where rows went, put their keys on the list, and say what the list changes; returns as `run_trace` does.

    Raises ThroughlineError where no output has any of the rows, and where the list is not what it should be.
    """
    from pipelines.storage.mirror import location_of

    path = _list_of(arguments, plan)
    found = _look(arguments, plan)
    if not found.rows:
        raise ThroughlineError(
            f"no output in {location_of(plan.output_root)} has a row of {', '.join(map(_plain, found.unknown[:3]))}; "
            "nothing was withdrawn. URLs count byte by byte, as they stand in the metadata"
        )
    num_new, digest, num_listed = _extend_list(path, found, plan.profile.dataset.withdrawn)
    change = {"path": str(path.absolute()), "sha256": digest}
    anew = _made_anew(plan) if num_new else {}
    if arguments.json:
        record = {"withdrawn": {**change, "num_new": num_new, "num_listed": num_listed}, "made_anew": anew}
        print(json.dumps(found.as_json() | record, indent=1, ensure_ascii=False))
        return _status(found)
    print("\n".join(trace_lines(found)))
    print(f"\n{path}: {_count(num_new, 'row')} more, {num_listed:,} in all. A profile that says")
    print(f'\n    [dataset]\n    withdrawn = {{ path = {json.dumps(change["path"])}, sha256 = "{digest}" }}\n')
    if anew:
        print("trains on none of them; its next run makes anew, and nothing else:")
        print("    " + ", ".join(f"{name} ({count})" if count > 1 else name for name, count in anew.items()))
    else:
        print("trains on none of them.")
    print("Outputs stay as they are: those above hold the rows until their folders are deleted.")
    if found.unreadable:
        print("Not all outputs could be asked, so that rows may be missing from the list.")
    return _status(found)


def _status(found: "Trace") -> int:
    return 1 if found.unreadable else 0


def _look(arguments: argparse.Namespace, plan: "Plan") -> "Trace":
    from orchestration.graph.resolution import INDEX
    from orchestration.lineage.trace import Outputs, trace
    from pipelines.core.progress import Progress
    from pipelines.laion.block_lists import read_entries
    from pipelines.laion.sources import scan_entry_list

    entries = list(arguments.rows)
    if arguments.file is not None:
        entries += read_entries(scan_entry_list(arguments.file))
    if not entries:
        raise ThroughlineError("name at least one row: a sample key, a URL, a domain, or a file of them by --from")
    outputs = Outputs.load(plan.output_root)
    # Without an index nothing else of the graph is found, and everything would look old.
    refs = [task.output.ref for task in plan.all_tasks() if task.output is not None]
    current = outputs.in_use(refs) if plan.task(INDEX).output is not None else None
    with Progress("trace", len(outputs), "outputs") as progress:
        return trace(outputs, list(dict.fromkeys(entries)), current, progress.advance)


def _list_of(arguments: argparse.Namespace, plan: "Plan") -> Path:
    """Return the list that is to grow; raises ThroughlineError where that is open, or would leave out another list."""
    named = plan.profile.dataset.withdrawn
    if arguments.list_file is None:
        if named is None:
            raise ThroughlineError("the profile has no list of withdrawn rows yet; name one: --list withdrawn.txt")
        return Path(named.path)
    chosen = Path(arguments.list_file)
    if named is not None and Path(named.path).resolve() != chosen.resolve():
        raise ThroughlineError(
            f"the profile's list of withdrawn rows is {named.path}, and a data set has one: leave --list out, or its "
            "rows would be back"
        )
    return chosen


def _extend_list(path: Path, found: "Trace", named: "EntryList | None") -> tuple[int, str, int]:
    """Add the rows that the list lacks at its end, each under its URL; return how many, the list's digest and size.

    Raises ThroughlineError where it is no text file, or has not the bytes that `named` says, or these and more lines.
    """
    from pipelines.core.atomic import exclusive, write_bytes
    from pipelines.laion.block_lists import read_keys
    from pipelines.laion.sources import scan_entry_list

    if path.exists() and not path.is_file():
        raise ThroughlineError(f"{path}: not a file; name a text file for the list of withdrawn rows")
    with exclusive(path.with_name(f".{path.name}.lock")):
        before = path.read_bytes() if path.exists() else b""
        if named is not None and not grew_from(before, named.sha256):
            raise ThroughlineError(
                f"{path}: {'not the list' if before else 'no list'} that the profile names (SHA-256 "
                f"{named.sha256[:12]}...), nor that one with more lines; rows that it names would be back in the data "
                "set. Put it back, or name the present one in the profile"
            )
        listed = read_keys(scan_entry_list(path)) if before else frozenset()
        new = [row for key, row in found.rows.items() if key not in listed]
        lines = [line for row in new for line in ([f"# {_plain(row.url)}"] if row.url else []) + [row.sample_key]]
        gap = b"\n" if before and not before.endswith(b"\n") else b""
        if new:
            write_bytes(path, before + gap + "".join(f"{line}\n" for line in lines).encode())
        return len(new), scan_entry_list(path).sha256, len(listed) + len(new)


def grew_from(data: bytes, sha256: str) -> bool:
    """Return whether bytes have this digest, or begin with whole lines that have it."""
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


def _made_anew(plan: "Plan") -> dict[str, int]:
    """Return the assets that a longer list makes anew, with the number of their partitions."""
    readers = {name for name, node in plan.graph.nodes.items() if "withdrawn" in node.stage.config_type.model_fields}
    names = plan.graph.downstream(readers)
    return {name: len(plan.partitions(name)) for name in plan.graph.nodes if name in names}


def trace_lines(found: "Trace") -> Iterator[str]:
    """Yield the trace as text: rows, a line for each output that holds some, and what was made from those."""
    from orchestration.console import table

    yield f"{_count(len(found.rows), 'row')}" + (":" if found.rows else ", so there is nothing to tell")
    for row in list(found.rows.values())[:_SHOWN_ROWS]:
        text = row.alt_text if len(row.alt_text) <= _TEXT_CHARS else row.alt_text[: _TEXT_CHARS - 3] + "..."
        yield f"  {row.sample_key}  {_plain(row.url) or '(in no subset any more)'}  {_plain(text)}".rstrip()
    if len(found.rows) > _SHOWN_ROWS:
        yield f"  and {len(found.rows) - _SHOWN_ROWS:,} more (--json has them all)"
    for entry in found.unknown:
        yield f"  {_plain(entry)}: no output has a row of it"
    with_rows = [holder for holder in found.holders if holder.keys]
    if with_rows:
        yield ""
        cells = [("", "held by", "data version", "rows", "where")]
        cells += [
            ("old" if holder.is_current is False else "", holder.label, holder.output.data_version[:12],
             f"{len(holder.keys):,}", _where(holder))
            for holder in with_rows
        ]  # fmt: skip
        yield table(cells, "  ")
    made = Counter((holder.stage, _age(holder)) for holder in found.holders if not holder.keys)
    if made:
        yield ""
        yield f"  made from these: {', '.join(f'{stage} ({count}{age})' for (stage, age), count in made.items())}"
    ended = Counter((drop.holder.label, _age(drop.holder), drop.reason) for drop in found.drops)
    if ended:
        yield ""
        said = [f"{count:,} by {label}{age} ({reason})" for (label, age, reason), count in ended.items()]
        yield f"  dropped: {', '.join(said)}"
    if any(holder.is_current is None for holder in found.holders):
        yield ""
        yield "  Which of these the profile uses is not known: its index is not finished, or its metadata out of reach."
    if found.unreadable:
        yield ""
        yield from (f"  could not be asked: {problem}" for problem in found.unreadable)


def _age(holder: "TracedOutput") -> str:
    return " old" if holder.is_current is False else ""


def _plain(text: str) -> str:
    """Return a text of the web on one line, without what a terminal or a list would take for more than text."""
    return text if text.isprintable() else json.dumps(text)


def _where(holder: "TracedOutput") -> str:
    """Return what an output says of the rows it holds: how often they were drawn, on which side, or in which files."""
    if holder.first_step is not None:
        return f"drawn {_count(holder.times_drawn, 'time')}, first in step {holder.first_step}"
    if holder.splits:
        return ", ".join(f"{count:,} {split}" for split, count in sorted(holder.splits.items()))
    names = sorted(holder.files)
    more = f" and {len(names) - _SHOWN_FILES:,} more" if len(names) > _SHOWN_FILES else ""
    return ", ".join(names[:_SHOWN_FILES]) + more


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
