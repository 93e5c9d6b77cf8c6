"""How many rows of LAION metadata pass a profile's filters: published counts where there are any, else assumptions."""

import math
from collections.abc import Iterator
from itertools import pairwise

from orchestration.cost.inputs import Inputs
from orchestration.cost.quantity import Basis, Figure, Input
from pipelines.laion.config import LaionSubsetConfig

PUBLISHED_SIMILARITY = 0.3
"""LAION-400M holds no row below it."""
_LONG_SIDES = ((1, 413e6), (256, 211e6), (512, 67e6), (1024, 9.6e6))
"""LAION-400M's rows whose sides are both at least so many pixels (laion.ai/blog/laion-400-open-dataset)."""
_PLAIN_RULES = (
    "opt_outs", "urls_denied", "urls_allowed", "domains_denied", "domains_allowed", "min_similarity_l14",
    "min_aesthetic", "max_pwatermark", "max_punsafe", "languages_allowed", "licenses_allowed", "min_text_words",
    "max_text_words", "where",
)  # fmt: skip


def passed_share(inputs: Inputs) -> Figure:
    """Return the share of rows that all filters keep."""
    product = Figure(1.0)
    for share in _shares(inputs):
        product = product * share
    return inputs.derived("pass_rules", product)


def unknown_rules(rules: LaionSubsetConfig) -> list[str]:
    """Return the rules that are on and that no assumption of their own speaks of."""
    return [name for name in _PLAIN_RULES if getattr(rules, name) is not None]


def _shares(inputs: Inputs) -> Iterator[Figure]:
    rules = inputs.profile.laion_subset
    if rules.min_similarity is not None:
        under = frozenset({Input(Basis.PROFILE, "laion_subset.min_similarity")})
        spared = rules.min_similarity <= PUBLISHED_SIMILARITY and "pass_similarity" not in inputs.chosen
        yield Figure(1.0, under) if spared else inputs.assumed("pass_similarity")
    if rules.nsfw_allowed is not None:
        yield inputs.assumed("pass_nsfw")
    if rules.min_side_px is not None:
        published = Figure(share_of_sides(rules.min_side_px), frozenset({Input(Basis.ASSUMED, "pass_size")}))
        yield inputs.derived("pass_size", published)
    if rules.max_aspect is not None:
        yield inputs.assumed("pass_aspect")
    if rules.min_text_chars is not None or rules.max_text_chars is not None:
        yield inputs.assumed("pass_text")
    selection = inputs.profile.laion_selection
    if rules.drop_duplicate_urls or (selection is not None and selection.drop_duplicate_urls):
        yield inputs.assumed("pass_unique")
    for _ in unknown_rules(rules):
        yield inputs.assumed("pass_other")


def share_of_sides(min_side_px: int) -> float:
    """Return the share of LAION-400M's rows with both sides at least so long, between the published counts.

    Straight lines through them on logarithmic scales; the last goes on beyond.
    """
    if min_side_px <= 1:
        return 1.0
    least, most = next(
        (pair for pair in pairwise(_LONG_SIDES) if min_side_px <= pair[1][0]),
        _LONG_SIDES[-2:],
    )
    slope = math.log(most[1] / least[1]) / math.log(most[0] / least[0])
    return least[1] * (min_side_px / least[0]) ** slope / _LONG_SIDES[0][1]
