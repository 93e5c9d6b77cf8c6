"""Checks of finished `scores` and `judge_calibration` outputs by their manifests."""

from pipelines.runner.checks import Check, CheckResult, Severity
from pipelines.runner.outputs import StageOutput


def check_missing_scores(scores: StageOutput, max_share: float = 0.05) -> CheckResult:
    """Check the share of scores that are missing because the judge's answer could not be parsed."""
    table = scores.manifest.conservation
    if table is None or table.rows_in == 0:
        return CheckResult(False, f"scores {scores.manifest.partition}: no scores were requested; check samples")
    missing = table.rows_in - table.rows_out
    share = missing / table.rows_in
    reasons = ", ".join(f"{count} {reason}" for reason, count in table.dropped.items())
    message = f"{missing} of {table.rows_in} scores are missing" + (f" ({reasons})" if reasons else "")
    return CheckResult(share <= max_share, message, {"share": share, "num_missing": missing, **table.dropped})


def check_judge_answer_format(scores: StageOutput, max_share: float = 0.05) -> CheckResult:
    """Check the share of answers to Yes/No questions that begin with neither word: their P("Yes") is doubtful."""
    summary = scores.manifest.summary
    total, other = summary.get("num_answers", 0), summary.get("num_answers_off_format", 0)
    share = other / total if total else 0.0
    message = f"{other} of {total} answers begin with neither Yes nor No"
    return CheckResult(share <= max_share, message, {"share": share, "num_answers": total})


def check_judge_calibration(
    calibration: StageOutput, min_accuracy: float = 0.75, min_answered: float = 0.95
) -> CheckResult:
    """Check that the judge distinguishes an image's own caption from another image's.

    A judge that always says Yes is right half the time, so the lower of the two accuracies counts.
    """
    summary = calibration.manifest.summary
    own, other = summary.get("accuracy_own"), summary.get("accuracy_other")
    num_questions = 2 * summary.get("num_images", 0)
    answered = summary.get("num_answers", 0) / num_questions if num_questions else 0.0
    numbers = {"accuracy_own": own, "accuracy_other": other, "auc": summary.get("auc"), "answered": answered}
    if own is None or other is None:
        return CheckResult(False, "the judge gave no readable answers about known images", numbers)
    message = f"right about {own:.1%} of own captions and {other:.1%} of others' ({answered:.1%} answered)"
    return CheckResult(min(own, other) >= min_accuracy and answered >= min_answered, message, numbers)


SCORE_CHECKS = (
    Check(
        name="judge_answers",
        description="At most one in twenty scores is missing because the judge's answer can't be parsed.",
        function=check_missing_scores,
        severity=Severity.WARNING,
    ),
    Check(
        name="judge_format",
        description="At most one in twenty answers to Yes/No questions begins with neither word.",
        function=check_judge_answer_format,
        severity=Severity.WARNING,
    ),
)
CALIBRATION = Check(
    name="judge_tells_apart",
    description="The judge distinguishes an image's own caption from another image's.",
    function=check_judge_calibration,
    severity=Severity.WARNING,
)
