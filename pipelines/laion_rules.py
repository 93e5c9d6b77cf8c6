"""The rules by which a subset keeps or drops LAION rows, each over a whole record batch at once.

Duplicates are left to `pipelines.laion_subset`: they need memory of the rows before.
"""

# pyarrow.compute makes its functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.stage_configs import LaionSubsetConfig

# The order in which rules are asked: a row counts under the first that drops it.
REASONS = (
    "url_missing", "url_not_http", "text_empty", "text_too_short", "text_too_long", "similarity_missing",
    "similarity_low", "nsfw_missing", "nsfw", "size_missing", "too_small", "aspect_extreme", "duplicate_pair",
    "duplicate_url",
)  # fmt: skip

BoolArray = np.ndarray


@dataclass(frozen=True)
class Rule:
    """`drops` returns a mask of the rows that the rule drops; `column` is the role it reads, if a file may lack it."""

    reason: str
    drops: Callable[[pa.RecordBatch], BoolArray]
    column: tuple[str, ...] = ()


def _mask(array: pa.Array) -> BoolArray:
    return pc.fill_null(array, False).to_numpy(zero_copy_only=False)


def _is_missing(batch: pa.RecordBatch, role: str) -> pa.Array:
    return pc.is_null(batch[role], nan_is_null=True)


def _trimmed_length(batch: pa.RecordBatch) -> pa.Array:
    return pc.utf8_length(pc.utf8_trim_whitespace(batch["text"]))


def _aspect(batch: pa.RecordBatch) -> pa.Array:
    width, height = batch["width"], batch["height"]
    shorter = pc.cast(pc.min_element_wise(width, height, skip_nulls=False), pa.float64())
    longer = pc.cast(pc.max_element_wise(width, height, skip_nulls=False), pa.float64())
    return pc.divide(longer, shorter)


def rules_of(config: LaionSubsetConfig) -> list[Rule]:
    """Return the active rules in the order of `REASONS`.

    They read batches with the columns url and text (string, text never null), width, height (float64), similarity
    (float64), nsfw (string): see `laion_subset.read_batches`.
    """
    rules = [
        Rule("url_missing", lambda batch: _mask(pc.equal(pc.fill_null(pc.utf8_length(batch["url"]), 0), 0))),
        Rule("url_not_http", lambda batch: ~_mask(pc.match_substring_regex(batch["url"], r"^(?i)https?://[^/?#\s]"))),
    ]
    if not config.keep_empty_text:
        rules.append(Rule("text_empty", lambda batch: _mask(pc.equal(_trimmed_length(batch), 0))))
    if (min_chars := config.min_text_chars) is not None:
        rules.append(Rule("text_too_short", lambda batch: _mask(pc.less(pc.utf8_length(batch["text"]), min_chars))))
    if (max_chars := config.max_text_chars) is not None:
        rules.append(Rule("text_too_long", lambda batch: _mask(pc.greater(pc.utf8_length(batch["text"]), max_chars))))
    if (least := config.min_similarity) is not None:
        rules += _with_missing(
            config,
            "similarity_missing",
            Rule("similarity_low", lambda batch: _mask(pc.less(batch["similarity"], least)), ("similarity",)),
        )
    if config.nsfw_allowed is not None:
        allowed = pa.array([label.upper() for label in config.nsfw_allowed], pa.string())
        rules += _with_missing(
            config,
            "nsfw_missing",
            Rule(
                "nsfw",
                lambda batch: (
                    _mask(pc.invert(pc.is_in(pc.utf8_upper(batch["nsfw"]), allowed)))
                    & ~_mask(_is_missing(batch, "nsfw"))
                ),
                ("nsfw",),
            ),
        )
    size_rules = []
    if (side := config.min_side_px) is not None:
        size_rules.append(
            Rule(
                "too_small",
                lambda batch: _mask(pc.less(pc.min_element_wise(batch["width"], batch["height"]), side)),
                ("width", "height"),
            )
        )
    if (most := config.max_aspect) is not None:
        size_rules.append(
            Rule("aspect_extreme", lambda batch: _mask(pc.greater(_aspect(batch), most)), ("width", "height"))
        )
    if size_rules:
        rules += _with_missing(config, "size_missing", *size_rules)
    return rules


def _with_missing(config: LaionSubsetConfig, reason: str, *rules: Rule) -> list[Rule]:
    """Put the rule about missing values in front of the rules that read them."""
    if config.keep_missing:
        return list(rules)
    roles = rules[0].column

    def drops(batch: pa.RecordBatch) -> BoolArray:
        masks = [_mask(_is_missing(batch, role)) for role in roles]
        return np.logical_or.reduce(masks)

    return [Rule(reason, drops, roles), *rules]


def first_reasons(rules: list[Rule], batch: pa.RecordBatch) -> np.ndarray:
    """Return per row the index of the first rule that drops it, or -1 for a row that every rule keeps."""
    reasons = np.full(batch.num_rows, -1, dtype=np.int16)
    for index, rule in enumerate(rules):
        reasons[(reasons < 0) & rule.drops(batch)] = index
    return reasons
