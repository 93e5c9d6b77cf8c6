"""Checks of finished outputs: their types, and the two that every output gets, conservation and digest.

A stage lists its own checks in its `Stage`. Nothing here knows who shows the results.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from pipelines.core.manifest import DROPPED_NAME
from pipelines.runner.outputs import StageOutput

_MAX_LISTED = 5


class Severity(StrEnum):
    """How serious a failed check is."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class CheckResult:
    """The outcome of a check."""

    passed: bool
    message: str
    """One sentence."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """The measured values behind the message; None where a value is unknown."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check of a single output."""

    name: str
    description: str
    function: Callable[[StageOutput], CheckResult]
    severity: Severity = Severity.ERROR


@dataclass(frozen=True, kw_only=True)
class SiblingsCheck:
    """A check that compares all finished partitions of a stage with each other."""

    name: str
    description: str
    function: Callable[[Sequence[StageOutput]], CheckResult]
    severity: Severity = Severity.ERROR


AnyCheck = Check | SiblingsCheck


def run_check(check: AnyCheck, output: StageOutput, siblings: Callable[[], Sequence[StageOutput]]) -> CheckResult:
    """Return the result of a check on an output; `siblings` lists the finished outputs of all its stage's partitions.

    Skips an output whose files are only in an object store: a check does not download them.
    """
    if not output.is_here:
        return CheckResult(True, "only in the object store, not checked here; `throughline audit` reads it there")
    result = check.function(output) if isinstance(check, Check) else check.function(siblings())
    return replace(result, numbers={name: value for name, value in result.numbers.items() if value is not None})


def conservation_problems(output: StageOutput) -> list[str]:
    """Return one sentence for each way in which an output's row counts do not add up."""
    import pyarrow.parquet as pq

    manifest, problems = output.manifest, []
    table = manifest.conservation
    if table is None:
        return []
    if not table.holds:
        problems.append(f"{table.rows_in} rows in, {table.rows_out} out, {sum(table.dropped.values())} dropped")
    listed: Counter[str] = Counter()
    if any(entry.path == DROPPED_NAME for entry in manifest.files):
        column = pq.read_table(output.path(DROPPED_NAME), columns=["reason"]).column("reason")
        listed = Counter(column.to_pylist())
    if dict(listed) != dict(table.dropped):
        problems.append(f"{DROPPED_NAME} lists {dict(listed)}, the manifest counts {dict(table.dropped)}")
    return problems


def check_conservation(output: StageOutput) -> CheckResult:
    """Check that rows in = rows out + dropped rows, and that the table of dropped rows has the same counts."""
    table = output.manifest.conservation
    if table is None:
        return CheckResult(True, "this stage counts no rows")
    problems = conservation_problems(output)
    dropped = {f"dropped_{reason}": num_rows for reason, num_rows in table.dropped.items()}
    numbers = {"rows_in": table.rows_in, "rows_out": table.rows_out, **dropped}
    return CheckResult(not problems, "; ".join(problems) or "every row is accounted for", numbers)


def check_digests(output: StageOutput, *, read_bytes: bool) -> CheckResult:
    """Compare every file with the manifest: SHA-256 if `read_bytes`, else the size alone."""
    problems = output.damaged(read_bytes=read_bytes)
    compared = "digest" if read_bytes else "size"
    numbers = {
        "num_files": len(output.manifest.files),
        "num_bytes": sum(entry.num_bytes for entry in output.manifest.files),
        "num_damaged": len(problems),
    }
    message = "; ".join(problems[:_MAX_LISTED]) or f"every file has the {compared} stated in the manifest"
    return CheckResult(not problems, message, numbers)


def universal_checks(*, read_bytes: bool) -> tuple[Check, ...]:
    """Return the checks of every output; `read_bytes` makes the digest check read all files back."""
    return (
        Check(
            name="conservation",
            description="Rows in = rows out + rows dropped by reason, and every dropped row is listed.",
            function=check_conservation,
        ),
        Check(
            name="digest",
            description="Every file matches its manifest.",
            function=lambda output: check_digests(output, read_bytes=read_bytes),
        ),
    )
