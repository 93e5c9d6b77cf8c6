"""Checks of training and judging: pure functions of manifests."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.runner.outputs import StageOutput


@dataclass(frozen=True)
class CheckResult:
    """Outcome of a check: passed or not, one sentence that says why, and the numbers behind it."""

    passed: bool
    sentence: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


def unscored_share(scores: StageOutput, max_share: float = 0.05) -> CheckResult:
    """Check that few scores could not be read from the judge's answers."""
    table = scores.manifest.conservation
    if table is None or table.rows_in == 0:
        return CheckResult(False, f"scores {scores.manifest.partition}: no scores were expected; check samples")
    missing = table.rows_in - table.rows_out
    share = missing / table.rows_in
    reasons = ", ".join(f"{count} {reason}" for reason, count in table.dropped.items())
    sentence = f"{missing} of {table.rows_in} scores are missing" + (f" ({reasons})" if reasons else "")
    return CheckResult(share <= max_share, sentence, {"share": share, "num_missing": missing, **table.dropped})


def check_judge_answer_format(scores: StageOutput, max_share: float = 0.05) -> CheckResult:
    """Check that few answers to Yes/No questions begin with neither word, which makes their P("Yes") doubtful."""
    summary = scores.manifest.summary
    total, other = summary.get("num_answers", 0), summary.get("num_answers_off_format", 0)
    share = other / total if total else 0.0
    sentence = f"{other} of {total} answers begin with neither Yes nor No"
    return CheckResult(share <= max_share, sentence, {"share": share, "num_answers": total})


def judge_calibration(calibration: StageOutput, min_accuracy: float = 0.75, min_answered: float = 0.95) -> CheckResult:
    """Check that the judge accepts an image's own caption and rejects another image's.

    A judge that always answers Yes is right half the time, so the lower of the two accuracies counts.
    """
    summary = calibration.manifest.summary
    own, other = summary.get("accuracy_own"), summary.get("accuracy_other")
    num_questions = 2 * summary.get("num_images", 0)
    answered = summary.get("num_answers", 0) / num_questions if num_questions else 0.0
    numbers = {"accuracy_own": own, "accuracy_other": other, "auc": summary.get("auc"), "answered": answered}
    if own is None or other is None:
        return CheckResult(False, "the judge gave no readable answers about known images", numbers)
    sentence = f"right about {own:.1%} of own captions and {other:.1%} of others' ({answered:.1%} answered)"
    return CheckResult(min(own, other) >= min_accuracy and answered >= min_answered, sentence, numbers)


def loss_is_finite_and_falls(checkpoint: StageOutput) -> CheckResult:
    """Check that a checkpoint's losses are finite and that the last one is below the first."""
    summary = checkpoint.manifest.summary
    first, last = summary.get("first_loss"), summary.get("final_loss")
    losses = {"first_loss": first, "final_loss": last, "validation_loss": summary.get("validation_loss")}
    known = {name: value for name, value in losses.items() if value is not None}
    bad = [name for name, value in known.items() if not math.isfinite(value)]
    if first is None or last is None or bad:
        return CheckResult(
            False, f"not a finite number: {', '.join(bad)}" if bad else "no losses in the manifest", known
        )
    sentence = f"loss {first:.4f} at the first step, {last:.4f} at the last"
    return CheckResult(last < first, sentence, known)


def same_order(checkpoints: Sequence[StageOutput]) -> CheckResult:
    """Check by consumption digests that all strategies consumed the same samples in the same order."""
    digests = {item.manifest.partition or "": item.manifest.summary.get("consumption_digest") for item in checkpoints}
    datasets = {ref.data_version for item in checkpoints for ref in item.manifest.inputs.get("dataset", ())}
    numbers = {
        "num_checkpoints": len(digests),
        "num_digests": len(set(digests.values())),
        "num_datasets": len(datasets),
    }
    without = sorted(name for name, digest in digests.items() if not digest)
    if not digests or without:
        return CheckResult(False, f"no consumption digest: {', '.join(without) or 'no checkpoints'}", numbers)
    if len(set(digests.values())) > 1 or len(datasets) > 1:
        sentence = "; ".join(f"{name}: {str(digest)[:16]}" for name, digest in sorted(digests.items()))
        return CheckResult(False, f"order or dataset differ between strategies ({sentence})", numbers)
    sentence = f"{len(digests)} strategies consumed the same samples in the same order ({next(iter(digests.values()))})"
    return CheckResult(True, sentence, numbers)
