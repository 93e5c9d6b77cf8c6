import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.core.errors import ThroughlineError
from pipelines.laion.presets import PRESETS, preset_rules
from tests.pipelines.laion.laion_world import drop_reasons, run_subset, write_laion
from tests.pipelines.laion.test_rules import JOINED, row

# Preset -> rows at and next to the published threshold, each with its reason for being dropped.
CASES: dict[str, list[tuple[dict[str, Any], str | None]]] = {
    "high-resolution": [({"width": 1024, "height": 1024}, None), ({"width": 1023, "height": 4000}, "too_small")],
    "aesthetic-v1": [
        ({"aesthetic": 7.0}, "aesthetic_low"),
        ({"aesthetic": 7.0001}, None),
        ({"aesthetic": 9, "pwatermark": 0.8001}, "pwatermark_high"),
        ({"aesthetic": 9, "pwatermark": 0.79}, None),
        ({"aesthetic": 9, "punsafe": 0.5}, "punsafe_high"),
    ],
    "laion-art": [({"aesthetic": 8.0}, "aesthetic_low"), ({"aesthetic": 8.01}, None)],
    "aesthetic-v2-4.75": [({"aesthetic": 4.75, "pwatermark": 1.0}, None), ({"aesthetic": 4.74}, "aesthetic_low")],
    "sd-1.2": [
        ({"height": 512, "aesthetic": 5.01}, None),
        ({"height": 511, "aesthetic": 5.01}, "too_small"),
        ({"height": 512, "aesthetic": 5.0}, "aesthetic_low"),
        ({"height": 512, "pwatermark": 0.5}, "pwatermark_high"),
    ],
    "sd-2": [
        ({"aesthetic": 4.5, "punsafe": 0.0999}, None),
        ({"punsafe": 0.1001}, "punsafe_high"),
        ({"aesthetic": 4.49, "punsafe": 0.0}, "aesthetic_low"),
    ],
    "datacomp-basic": [
        ({"text": "an ox go", "width": 600, "height": 200}, None),
        ({"text": "two words"}, "text_few_words"),
        ({"text": "a b c"}, "text_too_short"),
        ({"width": 199}, "too_small"),
        ({"width": 601, "height": 200}, "aspect_extreme"),
        ({"LANGUAGE": "de"}, "language"),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_presets_apply_the_published_threshold(tmp_path: Path, name: str) -> None:
    cases = CASES[name]
    rows = [row(number, **changes) for number, (changes, _) in enumerate(cases)]
    source = write_laion(tmp_path / "laion" / "p.parquet", rows, JOINED).parent
    output = run_subset(source, tmp_path / "out", **PRESETS[name]().model_dump(exclude={"source"}))
    assert drop_reasons(output) == {number: reason for number, (_, reason) in enumerate(cases) if reason}


def test_every_preset_names_its_source() -> None:
    for name, preset in PRESETS.items():
        assert preset.__doc__, name
        assert any(
            word in preset.__doc__ for word in ("arXiv", "card", "laion-datasets", "laion.ai", "`datacomp-clip-l14`")
        )


def test_changes_override_the_preset_and_invalid_ones_are_named() -> None:
    rules = preset_rules("datacomp-basic", {"languages_allowed": None, "min_side_px": 256})
    assert (rules.languages_allowed, rules.min_side_px, rules.min_text_words) == (None, 256, 3)
    with pytest.raises(ThroughlineError, match="preset best: unknown; known: laion400m, "):
        preset_rules("best", {})
    with pytest.raises(ThroughlineError, match="rule min_beauty: unknown; known: opt_outs, "):
        preset_rules(None, {"min_beauty": 5})
    with pytest.raises(ThroughlineError, match="rule where: position 5: incomplete at >"):
        preset_rules(None, {"where": "size>"})
    with pytest.raises(ThroughlineError, match="min_text_words 9 exceeds max_text_words 3"):
        preset_rules(None, {"min_text_words": 9, "max_text_words": 3})


def test_presets_refer_to_each_other_by_name() -> None:
    for preset in PRESETS.values():
        for name in re.findall(r"(?<!`)`([a-z0-9_.-]+)`(?!`)", preset.__doc__ or ""):
            assert name in PRESETS, preset.__doc__
