"""What is wrong with training and judging, as far as manifests tell: pure functions that read nothing else."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.runner.outputs import StageOutput


@dataclass(frozen=True)
class Verdict:
    """Whether all is well, what was seen in one sentence, and the numbers behind it."""

    passed: bool
    sentence: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


def unscored_share(scores: StageOutput, max_share: float = 0.05) -> Verdict:
    """Check how many scores could not be read from the judge's answers."""
    table = scores.manifest.conservation
    if table is None or table.rows_in == 0:
        return Verdict(False, f"scores {scores.manifest.partition}: no scores were wanted; look at samples")
    missing = table.rows_in - table.rows_out
    share = missing / table.rows_in
    reasons = ", ".join(f"{count} {reason}" for reason, count in table.dropped.items())
    said = f"{missing} of {table.rows_in} scores are missing" + (f" ({reasons})" if reasons else "")
    return Verdict(share <= max_share, said, {"share": share, "num_missing": missing, **table.dropped})


def judge_speaks_to_the_point(scores: StageOutput, max_share: float = 0.05) -> Verdict:
    """Check how many answers to Yes/No questions begin with neither word, which makes their P("Yes") doubtful."""
    summary = scores.manifest.summary
    total, other = summary.get("num_answers", 0), summary.get("num_answers_off_format", 0)
    share = other / total if total else 0.0
    said = f"{other} of {total} answers begin with neither Yes nor No"
    return Verdict(share <= max_share, said, {"share": share, "num_answers": total})


def judge_calibration(calibration: StageOutput, min_accuracy: float = 0.75, min_answered: float = 0.95) -> Verdict:
    """Check that the judge tells a picture's own caption from another's, each kind by itself.

    A judge that always says Yes is right half the time, so the worse of the two kinds counts.
    """
    summary = calibration.manifest.summary
    own, other = summary.get("accuracy_own"), summary.get("accuracy_other")
    wanted = 2 * summary.get("num_images", 0)
    answered = summary.get("num_answers", 0) / wanted if wanted else 0.0
    numbers = {"accuracy_own": own, "accuracy_other": other, "auc": summary.get("auc"), "answered": answered}
    if own is None or other is None:
        return Verdict(False, "the judge gave no readable answers about known pictures", numbers)
    said = f"right about {own:.1%} of own captions and {other:.1%} of others' ({answered:.1%} answered)"
    return Verdict(min(own, other) >= min_accuracy and answered >= min_answered, said, numbers)


def loss_is_finite_and_falls(checkpoint: StageOutput) -> Verdict:
    """Check first, last and validation loss of a checkpoint."""
    summary = checkpoint.manifest.summary
    first, last = summary.get("first_loss"), summary.get("final_loss")
    losses = {"first_loss": first, "final_loss": last, "validation_loss": summary.get("validation_loss")}
    known = {name: value for name, value in losses.items() if value is not None}
    bad = [name for name, value in known.items() if not math.isfinite(value)]
    if first is None or last is None or bad:
        return Verdict(False, f"not a finite number: {', '.join(bad)}" if bad else "no losses in the manifest", known)
    said = f"loss {first:.4f} at the first step, {last:.4f} at the last"
    return Verdict(last < first, said, known)


def same_order(checkpoints: Sequence[StageOutput]) -> Verdict:
    """Prove that all strategies consumed the same samples in the same order, by their consumption digests."""
    digests = {item.manifest.partition or "": item.manifest.summary.get("consumption_digest") for item in checkpoints}
    datasets = {ref.data_version for item in checkpoints for ref in item.manifest.inputs.get("dataset", ())}
    numbers = {
        "num_checkpoints": len(digests),
        "num_digests": len(set(digests.values())),
        "num_datasets": len(datasets),
    }
    without = sorted(name for name, digest in digests.items() if not digest)
    if not digests or without:
        return Verdict(False, f"no consumption digest: {', '.join(without) or 'no checkpoints'}", numbers)
    if len(set(digests.values())) > 1 or len(datasets) > 1:
        said = "; ".join(f"{name}: {str(digest)[:16]}" for name, digest in sorted(digests.items()))
        return Verdict(False, f"order or dataset differ between strategies ({said})", numbers)
    said = f"{len(digests)} strategies consumed the same samples in the same order ({next(iter(digests.values()))})"
    return Verdict(True, said, numbers)
