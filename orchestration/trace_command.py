"""The commands `throughline trace`, which tells where rows went, and `throughline withdraw`, which takes them out."""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import ThroughlineError

if TYPE_CHECKING:
    from orchestration.plan import Plan
    from orchestration.trace import Holder, Trace

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
    """Print where rows went; raises ThroughlineError where no row is named."""
    found = _look(arguments, plan)
    if arguments.json:
        print(json.dumps(found.as_json(), indent=1, ensure_ascii=False))
    else:
        print("\n".join(trace_lines(found)))
    return 0


def run_withdraw(arguments: argparse.Namespace, plan: "Plan") -> int:
    """Print where rows went, put their keys on the list, and say what the list changes.

    Raises ThroughlineError where no output has any of the rows.
    """
    path = _list_of(arguments, plan)
    found = _look(arguments, plan)
    if not found.rows:
        raise ThroughlineError(
            f"no output under {plan.output_root} has a row of {', '.join(found.unknown[:3])}; nothing was withdrawn"
        )
    num_new, digest, num_listed = _extend_list(path, found)
    change = {"path": str(path.absolute()), "sha256": digest}
    anew = _made_anew(plan)
    if arguments.json:
        record = {"withdrawn": {**change, "num_new": num_new, "num_listed": num_listed}, "made_anew": anew}
        print(json.dumps(found.as_json() | record, indent=1, ensure_ascii=False))
        return 0
    print("\n".join(trace_lines(found)))
    print(f"\n{path}: {_count(num_new, 'row')} more, {num_listed:,} in all. A profile that says")
    print(f'\n    [dataset]\n    withdrawn = {{ path = {json.dumps(change["path"])}, sha256 = "{digest}" }}\n')
    print("trains on none of them; its next run makes anew, and nothing else:")
    print("    " + ", ".join(f"{name} ({count})" if count > 1 else name for name, count in anew.items()))
    print("Outputs stay as they are. Those above hold the rows until their folders are deleted.")
    return 0


def _look(arguments: argparse.Namespace, plan: "Plan") -> "Trace":
    from orchestration.trace import count_outputs, trace
    from pipelines.entry_lists import read_entries
    from pipelines.progress import Progress
    from pipelines.stage_configs import EntryList

    entries = list(arguments.rows)
    if arguments.file is not None:
        entries += read_entries(EntryList.scan(arguments.file))
    if not entries:
        raise ThroughlineError("name at least one row: a sample key, a URL, a domain, or a file of them by --from")
    current = {task.output.ref for task in plan.all_tasks() if task.output is not None}
    with Progress("trace", count_outputs(plan.output_root), "outputs") as progress:
        return trace(plan.output_root, list(dict.fromkeys(entries)), current, progress.advance)


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


def _extend_list(path: Path, found: "Trace") -> tuple[int, str, int]:
    """Add the rows that the list lacks at its end, each under its URL; return how many, the list's digest and size."""
    from pipelines.atomic import exclusive
    from pipelines.entry_lists import read_entries
    from pipelines.stage_configs import EntryList

    with exclusive(path):
        before = path.read_bytes()
        listed = set(read_entries(EntryList.scan(path)))
        new = [row for key, row in found.rows.items() if key not in listed]
        lines = [line for row in new for line in ([f"# {row.url}"] if row.url else []) + [row.sample_key]]
        gap = b"\n" if before and not before.endswith(b"\n") else b""
        with path.open("ab") as stream:
            stream.write(gap + "".join(f"{line}\n" for line in lines).encode())
        return len(new), EntryList.scan(path).sha256, len(listed) + len(new)


def _made_anew(plan: "Plan") -> dict[str, int]:
    """Return the assets that a longer list makes anew, with the number of their partitions."""
    from orchestration.trace import CALIBRATION, DATASET

    names = plan.graph.downstream({DATASET, CALIBRATION})
    return {name: len(plan.partitions(name)) for name in plan.graph.nodes if name in names}


def trace_lines(found: "Trace") -> Iterator[str]:
    """Yield the trace as text: rows, a line for each output that holds some, and what was made from those."""
    from orchestration.console import table

    yield f"{_count(len(found.rows), 'row')}" + (":" if found.rows else ", so there is nothing to tell")
    for row in list(found.rows.values())[:_SHOWN_ROWS]:
        text = row.alt_text if len(row.alt_text) <= _TEXT_CHARS else row.alt_text[: _TEXT_CHARS - 3] + "..."
        yield f"  {row.sample_key}  {row.url or '(in no subset any more)'}  {text}".rstrip()
    if len(found.rows) > _SHOWN_ROWS:
        yield f"  and {len(found.rows) - _SHOWN_ROWS:,} more (--json has them all)"
    for entry in found.unknown:
        yield f"  {entry}: no output has a row of it"
    with_rows = [holder for holder in found.holders if holder.keys]
    if with_rows:
        yield ""
        cells = [("", "held by", "data version", "rows", "where")]
        cells += [
            ("" if holder.is_current else "old", holder.label, holder.output.data_version[:12],
             f"{len(holder.keys):,}", _where(holder))
            for holder in with_rows
        ]  # fmt: skip
        yield table(cells, "  ")
    made = Counter((holder.stage, holder.is_current) for holder in found.holders if not holder.keys)
    if made:
        yield ""
        said = [f"{stage} ({count}{'' if now else ' old'})" for (stage, now), count in made.items()]
        yield f"  made from these: {', '.join(said)}"
    ended = Counter((label, reason) for places in found.ends.values() for label, (reason, _) in places.items())
    if ended:
        yield ""
        yield "  dropped: " + ", ".join(f"{count:,} by {label} ({reason})" for (label, reason), count in ended.items())
    for problem in found.unreadable:
        yield f"  could not be asked: {problem}"


def _where(holder: "Holder") -> str:
    """Return what an output says of the rows it holds: how often they were drawn, on which side, or in which files."""
    from orchestration.trace import CHECKPOINT, DATASET

    notes = list(holder.notes.values())
    if holder.stage == CHECKPOINT:
        return f"drawn {_count(sum(note['times_seen'] for note in notes), 'time')}, first in step " + str(
            min(note["first_step"] for note in notes)
        )
    if holder.stage == DATASET:
        splits: Counter[str] = Counter(note["split"] for note in notes)
        return ", ".join(f"{count:,} {split}" for split, count in sorted(splits.items()))
    names = sorted(holder.files)
    more = f" and {len(names) - _SHOWN_FILES:,} more" if len(names) > _SHOWN_FILES else ""
    return ", ".join(names[:_SHOWN_FILES]) + more


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
