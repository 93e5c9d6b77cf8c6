"""Published sets of rules for a subset, each with its source, its thresholds, and what metadata alone can't do of it.

"Above 5.0" is written as the least number above it, since the rules' own thresholds are met by equal values.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from pipelines.core.errors import ThroughlineError, problem_in_words
from pipelines.laion.config import LaionSubsetConfig


def _above(value: float) -> float:
    return math.nextafter(value, math.inf)


def laion400m() -> LaionSubsetConfig:
    """LAION-400M's own rules (arXiv 2111.02114): CLIP ViT-B/32 similarity of 0.3, at least 5 characters of text.

    Duplicates there are of URL and text together. Not on metadata: the rule against pictures of less than 5 kB.
    """
    return LaionSubsetConfig(min_similarity=0.3, min_text_chars=5, drop_duplicate_urls=False)


def high_resolution() -> LaionSubsetConfig:
    """LAION-High-Resolution (its dataset card; LAION-5B, arXiv 2210.08402): both sides of at least 1024 pixels."""
    return LaionSubsetConfig(min_side_px=1024)


def ultra_high_resolution() -> LaionSubsetConfig:
    """The 2048-pixel subsets of LAION's list of high-resolution sets (laion-datasets, high_res_laion_datasets.md)."""
    return LaionSubsetConfig(min_side_px=2048)


def aesthetic_v1() -> LaionSubsetConfig:
    """LAION-Aesthetics V1 (laion-datasets, laion-aesthetic.md): pwatermark < 0.8, punsafe < 0.5, score above 7.

    The score must be the v1 predictor's: the column ``aesthetic`` or, in the tag tables, ``prediction``.
    """
    return LaionSubsetConfig(max_pwatermark=0.8, max_punsafe=0.5, min_aesthetic=_above(7.0))


def laion_art() -> LaionSubsetConfig:
    """LAION-Art, the best of LAION-Aesthetics V1 (laion-datasets, laion-aesthetic.md): as that, score above 8."""
    return LaionSubsetConfig(max_pwatermark=0.8, max_punsafe=0.5, min_aesthetic=_above(8.0))


def _aesthetic_v2(score: float) -> Callable[[], LaionSubsetConfig]:
    def preset() -> LaionSubsetConfig:
        return LaionSubsetConfig(min_aesthetic=score)

    preset.__doc__ = (
        f"LAION-Aesthetics V2 {score:g}+ (laion.ai/blog/laion-aesthetics): a score of {score:g} or higher by the "
        "improved predictor.\n\nThe score must be the v2 predictor's: the column ``AESTHETIC_SCORE``."
    )
    return preset


def sd_1_2() -> LaionSubsetConfig:
    """Stable Diffusion 1.2's "laion-improved-aesthetics" (model card CompVis/stable-diffusion-v1-2).

    Of LAION-2B-en: size of at least 512 x 512, aesthetic score above 5.0 (improved predictor), pwatermark < 0.5.
    English is what LAION-2B-en's tables hold; they carry no language column.
    """
    return LaionSubsetConfig(min_side_px=512, min_aesthetic=_above(5.0), max_pwatermark=0.5)


def sd_2() -> LaionSubsetConfig:
    """Stable Diffusion 2's 256-pixel stage (model card stabilityai/stable-diffusion-2-base): LAION-5B with
    ``punsafe=0.1``, read as below 0.1, and an aesthetic score of at least 4.5 (improved predictor)."""
    return LaionSubsetConfig(max_punsafe=0.1, min_aesthetic=4.5)


def sd_2_512() -> LaionSubsetConfig:
    """Stable Diffusion 2's 512-pixel stage (the same card): as `sd-2`, of at least 512 x 512 pixels."""
    return LaionSubsetConfig(max_punsafe=0.1, min_aesthetic=4.5, min_side_px=512)


def datacomp_basic() -> LaionSubsetConfig:
    """DataComp's basic filtering (arXiv 2304.14108, section 3.3, and its published code): English, more than two words
    and five characters, shorter side of at least 200 pixels, aspect of at most 3.

    English there is fastText's verdict on the text. CommonPool's tables don't carry it: it has to be joined to them
    as a column ``language`` or ``detected_language``, or be left out with ``languages_allowed=null``.
    """
    return LaionSubsetConfig(
        languages_allowed=("en",), min_text_words=3, min_text_chars=6, min_side_px=200, max_aspect=3.0,
        drop_duplicate_urls=False,
    )  # fmt: skip


def datacomp_clip_l14() -> LaionSubsetConfig:
    """DataComp's CLIP score filtering (arXiv 2304.14108, section 3.3): the 30 % of the pool with the highest ViT-L/14
    score.

    The published rule is the share, not a number: the threshold is that of the pool at hand. `throughline subset` finds
    it from the files it is given; elsewhere ``min_similarity_l14`` has to be set.
    """
    return LaionSubsetConfig(drop_duplicate_urls=False)


def datacomp_clip_b32() -> LaionSubsetConfig:
    """The same by ViT-B/32 score; see `datacomp-clip-l14`."""
    return LaionSubsetConfig(drop_duplicate_urls=False)


def datacomp_laion2b() -> LaionSubsetConfig:
    """DataComp's remake of LAION-2B's rules (arXiv 2304.14108): ViT-B/32 score of at least 0.28, English.

    English there is cld3's verdict on the text, to be joined as for `datacomp-basic`.
    """
    return LaionSubsetConfig(min_similarity=0.28, languages_allowed=("en",), drop_duplicate_urls=False)


PRESETS: Mapping[str, Callable[[], LaionSubsetConfig]] = MappingProxyType(
    {
        "laion400m": laion400m,
        "high-resolution": high_resolution,
        "ultra-high-resolution": ultra_high_resolution,
        "aesthetic-v1": aesthetic_v1,
        "laion-art": laion_art,
        **{f"aesthetic-v2-{score:g}": _aesthetic_v2(score) for score in (4.5, 4.75, 5.0, 6.0, 6.25, 6.5)},
        "sd-1.2": sd_1_2,
        "sd-2": sd_2,
        "sd-2-512": sd_2_512,
        "datacomp-basic": datacomp_basic,
        "datacomp-clip-l14": datacomp_clip_l14,
        "datacomp-clip-b32": datacomp_clip_b32,
        "datacomp-laion2b": datacomp_laion2b,
    }
)
TOP_SHARES: Mapping[str, tuple[str, float]] = MappingProxyType(
    {"datacomp-clip-l14": ("similarity_l14", 0.3), "datacomp-clip-b32": ("similarity", 0.3)}
)
"""Presets whose threshold is a share of the pool: role, share of the rows that stay."""


def preset_rules(name: str | None, changes: Mapping[str, Any]) -> LaionSubsetConfig:
    """Return the rules of a preset, or none of them without a name, with some fields changed.

    Raises ThroughlineError for an unknown name or a field that can't be what it is set to.
    """
    if name is not None and name not in PRESETS:
        raise ThroughlineError(f"preset {name}: unknown; known: {', '.join(PRESETS)}")
    base = PRESETS[name]().model_dump() if name else {}
    unknown = [field for field in changes if field not in LaionSubsetConfig.model_fields]
    if unknown:
        raise ThroughlineError(f"rule {unknown[0]}: unknown; known: {', '.join(LaionSubsetConfig.model_fields)}")
    try:
        return LaionSubsetConfig.model_validate(base | dict(changes))
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(map(str, item["loc"]))
        message = problem_in_words(item)
        raise ThroughlineError(f"rule {where}: {message}" if where else message) from error
