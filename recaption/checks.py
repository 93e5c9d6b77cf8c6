"""Caption quality: flags per caption from its text and finish reason, counts per stage output."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipelines.runner.checks import Check, CheckResult, Severity
from pipelines.runner.outputs import StageOutput
from recaption.config import CaptionCheckConfig

EMPTY = "empty"
TRUNCATED = "truncated"
REFUSAL = "refusal"
REPETITION = "repetition"
TOO_SHORT = "too_short"
FLAGS = (EMPTY, TRUNCATED, REFUSAL, REPETITION, TOO_SHORT)
_MAX_SHARES = {EMPTY: 0.01, TRUNCATED: 0.05, REFUSAL: 0.01, REPETITION: 0.05}
"""Share of an output's captions that may carry a flag before its check fails."""

_WORD = re.compile(r"\w+")
# Openings of refusals by instruction-tuned models. Only the start of a caption counts: an image may show such words.
_REFUSAL = re.compile(
    r"^\W*(?:(?:i(?:'|’)?m|i am) (?:sorry|unable|not able)|sorry\b|i apologi[sz]e|i (?:can(?:'|’)?t|cannot|can not)\b"
    r"|as an ai\b|unfortunately,? i\b|i (?:do not|don(?:'|’)?t) (?:have|see) (?:the ability|an image|any image))",
    re.IGNORECASE,
)


def caption_flags(caption: str, finish_reason: str, config: CaptionCheckConfig) -> list[str]:
    """Return the flags of one caption, in the order of `FLAGS`; a good caption has none."""
    words = [word.lower() for word in _WORD.findall(caption)]
    if not words:
        return [EMPTY]
    checks = {
        TRUNCATED: finish_reason == "length",
        REFUSAL: _REFUSAL.match(caption) is not None,
        REPETITION: repeated_share(words, config.ngram_words) > config.max_repeated_share,
        TOO_SHORT: len(words) < config.min_words,
    }
    return [flag for flag, holds in checks.items() if holds]


def repeated_share(words: list[str], ngram_words: int) -> float:
    """Return the share of a text's word n-grams that repeat an earlier one, in [0, 1)."""
    ngrams = [tuple(words[start : start + ngram_words]) for start in range(len(words) - ngram_words + 1)]
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


@dataclass(frozen=True)
class CaptionQuality:
    """The number of captions in an output, and the number with each flag of `FLAGS`."""

    num_captions: int
    num_flagged: Mapping[str, int]

    def share(self, flag: str) -> float:
        return self.num_flagged[flag] / self.num_captions if self.num_captions else 0.0


def count_flags(rows: Iterable[Iterable[str]]) -> dict[str, int]:
    """Return the number of rows with each flag, zeros included."""
    counts = Counter(flag for flags in rows for flag in flags)
    return {flag: counts[flag] for flag in FLAGS}


def caption_quality(captions: StageOutput) -> CaptionQuality:
    """Count flags over the tables of a finished `captions` output."""
    import pyarrow.parquet as pq

    flags = [
        row
        for path in captions.files(".parquet")
        if path.name.startswith("captions-")
        for row in pq.read_table(path, columns=["flags"]).column("flags").to_pylist()
    ]
    return CaptionQuality(num_captions=len(flags), num_flagged=count_flags(flags))


def check_caption_quality(captions: StageOutput) -> CheckResult:
    """Check that few captions are empty, truncated, refusals or repetitive."""
    quality = caption_quality(captions)
    over = [f"{quality.share(flag):.1%} {flag}" for flag, limit in _MAX_SHARES.items() if quality.share(flag) > limit]
    numbers = {"num_captions": quality.num_captions, **{f"num_{k}": v for k, v in quality.num_flagged.items()}}
    message = ", ".join(over) or "few captions are empty, truncated, refusals or repetitive"
    return CheckResult(not over, message, numbers)


CAPTION_QUALITY = Check(
    name="caption_quality",
    description="Few captions are empty, truncated, refusals, or repeat themselves.",
    function=check_caption_quality,
    severity=Severity.WARNING,
)
