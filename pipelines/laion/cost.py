"""Cost model of `laion_subset`, the selectivity of its filters, and filtering on several machines."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from pipelines.core.quantity import Basis, Quantity, Source, largest, smallest
from pipelines.laion.config import LaionSelectionConfig, LaionSubsetConfig
from pipelines.runner.cost import CostInputs, StageEstimate, Workload

PUBLISHED_SIMILARITY = 0.3
"""LAION-400M has no row below it."""
_ROWS_BY_SIDE = ((1, 413e6), (256, 211e6), (512, 67e6), (1024, 9.6e6))
"""Rows of LAION-400M by the least length in pixels of both sides (laion.ai/blog/laion-400-open-dataset)."""
_OTHER_RULES = (
    "opt_outs", "urls_denied", "urls_allowed", "domains_denied", "domains_allowed", "min_similarity_l14",
    "min_aesthetic", "max_pwatermark", "max_punsafe", "languages_allowed", "licenses_allowed", "min_text_words",
    "max_text_words", "where",
)  # fmt: skip
_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class FilteringEstimate:
    """Filtering all metadata with `processes` on each of `nodes` machines, including dedup across parts."""

    nodes: int
    processes: Quantity
    seconds: Quantity
    selection_seconds: Quantity
    """The share of `seconds` spent on dedup across parts: one process on one machine."""
    memory_bytes: Quantity
    """Of one machine."""


def subset_cost(inputs: CostInputs, workload: Workload) -> StageEstimate:
    """Return the estimate of `laion_subset`."""
    passed = workload.rows * selectivity(inputs)
    return StageEstimate(
        stage=workload.stage,
        rows_in=workload.rows,
        rows_out=passed,
        bytes_in=workload.rows * inputs.assumed("metadata_row_bytes"),
        bytes_out=passed * inputs.assumed("subset_row_bytes"),
        seconds=workload.rows / (inputs.assumed("filter_rows_per_second") * workload.num_runs),
        nodes=workload.num_runs,
        limit="one process",
    )


def filtering(inputs: CostInputs, nodes: int) -> FilteringEstimate:
    """Return the estimate of filtering on `nodes` machines.

    Each process takes whole parts, as many processes a machine as its cores and memory allow. One process then dedups
    across parts.
    """
    assumed = inputs.assumed
    part_rows = smallest(assumed("part_rows"), inputs.metadata_rows)
    part_memory = assumed("filter_base_bytes") + assumed("filter_bytes_per_row") * part_rows
    fitting = inputs.from_profile("needs.memory_gib") * _GIB / part_memory
    parts_per_node = (inputs.num_parts / nodes).rounded_up()
    processes = largest(Quantity(1.0), smallest(assumed("cores_per_node"), fitting - fitting.value % 1, parts_per_node))
    waves = (inputs.num_parts / (processes * nodes)).rounded_up()
    passed = inputs.metadata_rows * selectivity(inputs)
    selection = passed / assumed("selection_rows_per_second")
    return FilteringEstimate(
        nodes=nodes,
        processes=processes,
        seconds=waves * part_rows / assumed("filter_rows_per_second") + selection,
        selection_seconds=selection,
        memory_bytes=processes * part_memory,
    )


def selectivity(inputs: CostInputs) -> Quantity:
    """Return the share of rows that pass all filters: by published counts where there are any, else by assumptions."""
    product = Quantity(1.0)
    for share in _rule_selectivities(inputs):
        product = product * share
    return inputs.derived("pass_rules", product)


def rules_without_assumption(rules: LaionSubsetConfig) -> list[str]:
    """Return the active rules whose selectivity has no assumption of its own."""
    return [name for name in _OTHER_RULES if getattr(rules, name) is not None]


def _rule_selectivities(inputs: CostInputs) -> Iterator[Quantity]:
    rules = inputs.setting("laion_subset", LaionSubsetConfig)
    if rules.min_similarity is not None:
        source = frozenset({Source(Basis.PROFILE, "laion_subset.min_similarity")})
        keeps_all = rules.min_similarity <= PUBLISHED_SIMILARITY and not inputs.is_chosen("pass_similarity")
        yield Quantity(1.0, source) if keeps_all else inputs.assumed("pass_similarity")
    if rules.nsfw_allowed is not None:
        yield inputs.assumed("pass_nsfw")
    if rules.min_side_px is not None:
        source = frozenset({Source(Basis.ASSUMED, "pass_size")})
        yield inputs.derived("pass_size", Quantity(side_selectivity(rules.min_side_px), source))
    if rules.max_aspect is not None:
        yield inputs.assumed("pass_aspect")
    if rules.min_text_chars is not None or rules.max_text_chars is not None:
        yield inputs.assumed("pass_text")
    selection = inputs.optional_setting("laion_selection", LaionSelectionConfig)
    if rules.drop_duplicate_urls or (selection is not None and selection.drop_duplicate_urls):
        yield inputs.assumed("pass_unique")
    for _ in rules_without_assumption(rules):
        yield inputs.assumed("pass_other")


def side_selectivity(min_side_px: int) -> float:
    """Return the share of LAION-400M's rows with both sides at least so long.

    Interpolates the published counts linearly on logarithmic axes, and extrapolates the last segment.
    """
    if min_side_px <= 1:
        return 1.0
    lower, upper = next(
        (pair for pair in pairwise(_ROWS_BY_SIDE) if min_side_px <= pair[1][0]),
        _ROWS_BY_SIDE[-2:],
    )
    slope = math.log(upper[1] / lower[1]) / math.log(upper[0] / lower[0])
    return lower[1] * (min_side_px / lower[0]) ** slope / _ROWS_BY_SIDE[0][1]
