"""Published rule sets: each with its source, its thresholds, and the rules that metadata alone can't apply.

A value equal to a minimum passes a rule, so "above 5.0" is the next larger float.
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

    It deduplicates by URL and text together. Not included: the rule against images below 5 kB, which needs the images.
    """
    return LaionSubsetConfig(min_similarity=0.3, min_text_chars=5, drop_duplicate_urls=False)


def high_resolution() -> LaionSubsetConfig:
    """LAION-High-Resolution (its dataset card; LAION-5B, arXiv 2210.08402): both sides at least 1024 pixels."""
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
    """LAION-Art, the best of LAION-Aesthetics V1 (laion-datasets, laion-aesthetic.md): the same, score above 8."""
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

    From LAION-2B-en: at least 512 x 512 pixels, aesthetic score above 5.0 (improved predictor), pwatermark < 0.5.
    LAION-2B-en's tables are English and have no language column.
    """
    return LaionSubsetConfig(min_side_px=512, min_aesthetic=_above(5.0), max_pwatermark=0.5)


def sd_2() -> LaionSubsetConfig:
    """Stable Diffusion 2's 256-pixel stage (model card stabilityai/stable-diffusion-2-base): LAION-5B with
    ``punsafe=0.1``, read as below 0.1, and an aesthetic score of at least 4.5 (improved predictor)."""
    return LaionSubsetConfig(max_punsafe=0.1, min_aesthetic=4.5)


def sd_2_512() -> LaionSubsetConfig:
    """Stable Diffusion 2's 512-pixel stage (the same card): `sd-2` with at least 512 x 512 pixels."""
    return LaionSubsetConfig(max_punsafe=0.1, min_aesthetic=4.5, min_side_px=512)


def datacomp_basic() -> LaionSubsetConfig:
    """DataComp's basic filtering (arXiv 2304.14108, section 3.3, and its published code): English, more than two words
    and five characters, shorter side of at least 200 pixels, aspect ratio of at most 3.

    fastText classifies the language of the text. CommonPool's tables have no language column: join one as ``language``
    or ``detected_language``, or switch the rule off with ``languages_allowed=null``.
    """
    return LaionSubsetConfig(
        languages_allowed=("en",), min_text_words=3, min_text_chars=6, min_side_px=200, max_aspect=3.0,
        drop_duplicate_urls=False,
    )  # fmt: skip


def datacomp_clip_l14() -> LaionSubsetConfig:
    """DataComp's CLIP score filtering (arXiv 2304.14108, section 3.3): the 30 % of the pool with the highest ViT-L/14
    score.

    The published rule is a share, so the threshold depends on the pool: `throughline subset` computes it from its input
    files; elsewhere set ``min_similarity_l14``.
    """
    return LaionSubsetConfig(drop_duplicate_urls=False)


def datacomp_clip_b32() -> LaionSubsetConfig:
    """The same by ViT-B/32 score; see `datacomp-clip-l14`."""
    return LaionSubsetConfig(drop_duplicate_urls=False)


def datacomp_laion2b() -> LaionSubsetConfig:
    """DataComp's reproduction of LAION-2B's rules (arXiv 2304.14108): ViT-B/32 score of at least 0.28, English.

    cld3 classifies the language of the text; join the column as for `datacomp-basic`.
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
"""Presets whose threshold is a share of the pool: role, share of the rows to keep."""


def preset_rules(name: str | None, changes: Mapping[str, Any]) -> LaionSubsetConfig:
    """Return the rules of a preset, or no rules without a name, with some fields changed.

    Raises ThroughlineError for an unknown preset or field, or an invalid value.
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
