"""Checks of finished checkpoints by their manifests: losses, and equal consumption of samples by all strategies."""

import math
from collections.abc import Sequence

from pipelines.runner.checks import AnyCheck, Check, CheckResult, Severity, SiblingsCheck
from pipelines.runner.outputs import StageOutput


def check_loss(checkpoint: StageOutput) -> CheckResult:
    """Check that the losses are finite and that the last is below the first."""
    summary = checkpoint.manifest.summary
    first, last = summary.get("first_loss"), summary.get("final_loss")
    losses = {"first_loss": first, "final_loss": last, "validation_loss": summary.get("validation_loss")}
    known = {name: value for name, value in losses.items() if value is not None}
    bad = [name for name, value in known.items() if not math.isfinite(value)]
    if first is None or last is None or bad:
        return CheckResult(False, f"not finite: {', '.join(bad)}" if bad else "no losses in the manifest", known)
    return CheckResult(last < first, f"loss {first:.4f} at the first step, {last:.4f} at the last", known)


def check_same_order(checkpoints: Sequence[StageOutput]) -> CheckResult:
    """Prove by consumption digests that all strategies consumed the same samples in the same order."""
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
        listed = "; ".join(f"{name}: {str(digest)[:16]}" for name, digest in sorted(digests.items()))
        return CheckResult(False, f"order or data set differs between strategies ({listed})", numbers)
    digest = next(iter(digests.values()))
    message = f"{len(digests)} strategies consumed the same samples in the same order ({digest})"
    return CheckResult(True, message, numbers)


CHECKPOINT_CHECKS: tuple[AnyCheck, ...] = (
    Check(
        name="loss",
        description="The loss is finite and falls.",
        function=check_loss,
        severity=Severity.WARNING,
    ),
    SiblingsCheck(
        name="same_order",
        description="All strategies consumed the same samples in the same order.",
        function=check_same_order,
    ),
)
