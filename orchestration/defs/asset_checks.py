"""What the asset checks look for in a finished output: pure functions from a task to a finding."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evaluation.judging.checks import (
    Verdict,
    judge_calibration,
    judge_speaks_to_the_point,
    loss_is_finite_and_falls,
    same_order,
    unscored_share,
)
from pipelines.core.manifest import DROPPED_NAME
from pipelines.core.safetensors_file import count_not_finite
from pipelines.runner.outputs import StageOutput

if TYPE_CHECKING:
    from orchestration.graph.resolution import Plan, Task

_MAX_NAMED = 5
_MAX_FEATURE_FILES = 64


@dataclass(frozen=True)
class Finding:
    """Whether an output is as it should be, and what was seen."""

    passed: bool
    sentence: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Check:
    """A question asked of every finished task of an asset. A failed one warns unless it is `severe`."""

    name: str
    description: str
    look: "Callable[[Plan, Task], Finding]"
    severe: bool = True


def _output(task: "Task") -> StageOutput:
    assert task.output is not None
    return task.output


def conservation_problems(output: StageOutput) -> list[str]:
    """Return a sentence for each way in which an output's row counts don't add up."""
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


def look_at_conservation(plan: "Plan", task: "Task") -> Finding:
    table = _output(task).manifest.conservation
    if table is None:
        return Finding(True, "this stage counts no rows")
    problems = conservation_problems(_output(task))
    counts = {
        "rows_in": table.rows_in,
        "rows_out": table.rows_out,
        **{f"dropped_{k}": v for k, v in table.dropped.items()},
    }
    return Finding(not problems, "; ".join(problems) or "every row is accounted for", counts)


def look_at_digests(plan: "Plan", task: "Task") -> Finding:
    output, read_bytes = _output(task), plan.profile.check_bytes
    problems = output.damaged(read_bytes=read_bytes)
    num_bytes = sum(entry.num_bytes for entry in output.manifest.files)
    said = "every file has the digest of the manifest" if read_bytes else "every file has the size of the manifest"
    return Finding(
        not problems,
        "; ".join(problems[:_MAX_NAMED]) or said,
        {"num_files": len(output.manifest.files), "num_bytes": num_bytes, "num_damaged": len(problems)},
    )


def look_at_duplicate_keys(plan: "Plan", task: "Task") -> Finding:
    import pyarrow.parquet as pq

    keys = pq.read_table(_output(task).path("samples.parquet"), columns=["sample_key"]).column("sample_key")
    num_twice = len(keys) - len(keys.unique())
    said = f"{num_twice} sample keys stand there twice" if num_twice else "every sample key stands there once"
    return Finding(num_twice == 0, said, {"num_samples": len(keys), "num_duplicates": num_twice})


def look_at_captions(plan: "Plan", task: "Task") -> Finding:
    from recaption.checks import EMPTY, REFUSAL, REPETITION, TRUNCATED, caption_quality

    quality = caption_quality(_output(task))
    limits = {EMPTY: 0.01, TRUNCATED: 0.05, REFUSAL: 0.01, REPETITION: 0.05}
    over = [f"{quality.share(flag):.1%} {flag}" for flag, limit in limits.items() if quality.share(flag) > limit]
    numbers = {"num_captions": quality.num_captions, **{f"num_{k}": v for k, v in quality.num_flagged.items()}}
    return Finding(not over, ", ".join(over) or "few captions are empty, cut, refused or repetitive", numbers)


def look_for_nan(plan: "Plan", task: "Task") -> Finding:
    files = _output(task).files(".safetensors")[:_MAX_FEATURE_FILES]
    bad = {path.name: count for path in files if (count := count_not_finite(path))}
    said = "; ".join(f"{name}: {count} values are NaN or infinite" for name, count in list(bad.items())[:_MAX_NAMED])
    return Finding(not bad, said or "every value is finite", {"num_files": len(files), "num_bad_files": len(bad)})


def _said_by(judge: Callable[[StageOutput], Verdict]) -> "Callable[[Plan, Task], Finding]":
    """Make a question to the plan of one that the evaluation asks of an output."""

    def look(plan: "Plan", task: "Task") -> Finding:
        verdict = judge(_output(task))
        return Finding(verdict.passed, verdict.sentence, _without_none(verdict.numbers))

    return look


def _without_none(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if value is not None}


def look_at_same_order(plan: "Plan", task: "Task") -> Finding:
    """Compare a checkpoint with all others that are finished."""
    others = [other.output for other in plan.tasks(task.node.name) if other.output is not None]
    verdict = same_order(others)
    return Finding(verdict.passed, verdict.sentence, verdict.numbers)


CONSERVATION = Check(
    name="conservation",
    description="Rows in = rows out + rows dropped by reason, and every dropped row is listed.",
    look=look_at_conservation,
)
DIGESTS = Check(name="digest", description="Every file is what its manifest says.", look=look_at_digests)
CHECKS: Mapping[str, tuple[Check, ...]] = {
    "captions": (
        Check(
            name="caption_quality",
            description="Few captions are empty, truncated, refusals, or repeat themselves.",
            look=look_at_captions,
            severe=False,
        ),
    ),
    "latents": (Check(name="finite", description="No NaN or infinity in the latents.", look=look_for_nan),),
    "text_features": (Check(name="finite", description="No NaN or infinity in the features.", look=look_for_nan),),
    "dataset": (
        Check(name="duplicate_keys", description="Each sample key stands there once.", look=look_at_duplicate_keys),
    ),
    "checkpoint": (
        Check(
            name="loss",
            description="The loss is finite and falls.",
            look=_said_by(loss_is_finite_and_falls),
            severe=False,
        ),
        Check(
            name="same_order",
            description="All strategies consumed the same samples in the same order.",
            look=look_at_same_order,
        ),
    ),
    "scores": (
        Check(
            name="judge_answers",
            description="At most one in twenty scores is missing because the judge's answer can't be read.",
            look=_said_by(unscored_share),
            severe=False,
        ),
        Check(
            name="judge_format",
            description="At most one in twenty answers to Yes/No questions begins with neither word.",
            look=_said_by(judge_speaks_to_the_point),
            severe=False,
        ),
    ),
    "judge_calibration": (
        Check(
            name="judge_tells_apart",
            description="The judge tells a picture's own caption from another's.",
            look=_said_by(judge_calibration),
            severe=False,
        ),
    ),
}


def look(check: Check, plan: "Plan", task: "Task") -> Finding:
    """Return what a check finds; an output that lies in an object store alone is not fetched for it."""
    if not _output(task).is_here:
        return Finding(True, "finished in the object store and not fetched here; `throughline audit` reads it there")
    return check.look(plan, task)


def checks_of(asset: str) -> tuple[Check, ...]:
    """Return the checks of an asset."""
    return (CONSERVATION, DIGESTS, *CHECKS.get(asset, ()))
