"""`throughline subset` from its arguments to its files, and its own parts."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.cli.funnel import funnel_lines, funnel_svg, steps_of
from orchestration.cli.main import main
from pipelines.core.errors import ThroughlineError
from pipelines.laion.top_share import top_share_threshold


def write_part(path: Path, start: int, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(start, start + 40)
    table = {
        "url": [f"http://a.example/{number % 60}.jpg" for number in numbers],
        "text": [f"a cat {number % 70}" for number in numbers],
        "original_width": [number * 10 for number in numbers],
        "original_height": [300] * 40,
        "clip_l14_similarity_score": pa.array([number / 100 for number in numbers], pa.float32()),
    }
    pq.write_table(pa.table(table | columns), path)
    return path


def subset(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as caught:
        main(["subset", "--json", *arguments])
    captured = capsys.readouterr()
    assert caught.value.code == 0, captured.err
    return json.loads(captured.out)


@pytest.mark.slow
def test_a_subset_of_several_parts_accounts_for_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        write_part(tmp_path / "in" / f"{number}.parquet", number * 40)
    words = ["--input", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--set", "min_side_px=100"]
    words += ["--where", "text <> 'a cat 11'", "--limit", "20"]
    outcome = subset(capsys, *words, "--workers", "2")
    assert outcome["rows_in"] == 120
    assert outcome["rows_in"] == outcome["rows_out"] + sum(outcome["dropped"].values())
    # Widths under 100 px are rows 0 to 9, text 11 is rows 11 and 81; the rest has 60 URLs, of which 20 are sampled.
    assert outcome["dropped"] == {"too_small": 10, "where": 2, "duplicate_url": 48, "not_sampled": 40}
    keys = [key for path in outcome["files"] for key in pq.read_table(path)["sample_key"].to_pylist()]
    assert len(keys) == len(set(keys)) == 20
    chart = ET.fromstring((tmp_path / "out" / "funnel.svg").read_text())
    assert "not_sampled" in "".join(chart.itertext())
    assert subset(capsys, *words)["selection"] == outcome["selection"]

    # One file with the rows in another order holds the same subset.
    whole = pa.concat_tables(pq.read_table(path) for path in sorted((tmp_path / "in").iterdir()))
    shuffled = whole.take(np.random.default_rng(0).permutation(len(whole)))
    (tmp_path / "one").mkdir()
    pq.write_table(shuffled, tmp_path / "one" / "all.parquet")
    words[1] = str(tmp_path / "one" / "*.parquet")
    words[3] = str(tmp_path / "out-one")
    (file,) = subset(capsys, *words)["files"]
    assert sorted(pq.read_table(file)["sample_key"].to_pylist()) == sorted(keys)


@pytest.mark.slow
def test_a_subset_made_on_ray_equals_the_local_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    from recaption.ray_pool import close_pools

    for number in range(3):
        write_part(tmp_path / "in" / f"{number}.parquet", number * 40)
    words = ["--input", str(tmp_path / "in"), "--limit", "20"]
    here = subset(capsys, *words, "--out", str(tmp_path / "out"), "--workers", "1")
    close_pools()
    try:
        on_ray = subset(capsys, *words, "--out", str(tmp_path / "ray"), "--ray", "local")
    finally:
        ray.shutdown()
    assert on_ray["dropped"] == here["dropped"]
    assert Path(on_ray["selection"]).parent.name == Path(here["selection"]).parent.name


def test_the_clip_preset_takes_its_threshold_from_the_pool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_part(tmp_path / "in" / "p.parquet", 0)
    words = ["--input", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--preset", "datacomp-clip-l14"]
    outcome = subset(capsys, *words)
    # The score of rank int(40 x 0.3) from the top is row 27's; equal scores are kept.
    assert outcome["rules"]["min_similarity_l14"] == pytest.approx(0.27)
    assert outcome["dropped"] == {"similarity_l14_low": 27}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "best"], "error: preset best: unknown; known: laion400m, "),
        (["--set", "min_side_px"], "error: --set min_side_px: expected RULE=VALUE"),
        (["--set", "min_side_px=wide"], "error: rule min_side_px: Input should be a valid integer"),
        (["--where", "width >"], "error: rule where: position 7: incomplete at >"),
        (
            ["--where", "beauty > 1"],
            "p.parquet: where, position 1: no column beauty; known: clip_l14_similarity_score, ",
        ),
        (["--set", "opt_outs=absent.txt"], "error: absent.txt: the list can't be read"),
        (["--limit", "0"], "error: --limit 0: expected at least 1"),
        (["--workers", "-3"], "error: --workers -3: expected at least 1"),
        (["--workers", "0"], "error: --workers 0: expected at least 1"),
        (["--where", ""], "error: --where '': expected a value, found none"),
        (["--ray", ""], "error: --ray '': expected a value, found none"),
        (["--set", "min_aesthetic=5"], "p.parquet: no column aesthetic, which the rule min_aesthetic needs; switch"),
    ],
)
def test_an_invalid_argument_is_one_sentence(tmp_path: Path, words: list[str], message: str) -> None:
    write_part(tmp_path / "in" / "p.parquet", 0)
    with pytest.raises(SystemExit) as caught:
        main(["subset", "--input", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *words])
    assert message in str(caught.value.code)
    assert "\n" not in str(caught.value.code)


def test_a_file_as_output_root_is_one_sentence(tmp_path: Path) -> None:
    file = write_part(tmp_path / "in" / "p.parquet", 0)
    with pytest.raises(SystemExit) as caught:
        main(["subset", "--input", str(file), "--out", str(file)])
    assert caught.value.code == (
        f"error: --out {file}: expected a folder, found a file; name another with: --out /a/folder"
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1, 1, width=32) | st.sampled_from([0.25, -0.0, float("nan")]), min_size=2, max_size=60),
    st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9]),
)
def test_the_threshold_of_a_share_is_the_one_a_sort_finds(
    tmp_path_factory: pytest.TempPathFactory, scores: list[float], share: float
) -> None:
    folder = tmp_path_factory.mktemp("scores")
    files = []
    for number, part in enumerate((scores[::2], scores[1::2])):
        pq.write_table(pa.table({"S": pa.array(part, pa.float32())}), folder / f"{number}.parquet")
        files.append((folder / f"{number}.parquet", {"similarity": "S"}))
    ranked = sorted((score for score in scores if score == score), reverse=True)
    place = int(len(scores) * share)
    if place >= len(ranked):
        with pytest.raises(ThroughlineError, match="rows have a similarity, too few"):
            top_share_threshold(files, "similarity", share)
    else:
        assert top_share_threshold(files, "similarity", share) == ranked[place]


def test_the_funnel_counts_down_to_the_kept_rows() -> None:
    steps = steps_of(100, {"nsfw": 20, "too_small": 30}, ["too_small", "language", "nsfw"])
    assert [(step.reason, step.dropped, step.left) for step in steps] == [("too_small", 30, 70), ("nsfw", 20, 50)]
    assert [line.split() for line in funnel_lines(100, steps)[1:]] == [
        ["rows", "100"],
        ["too_small", "30", "30.00%", "70"],
        ["nsfw", "20", "20.00%", "50"],
        ["kept", "50.00%", "50"],
    ]
    assert "a &lt; b" in funnel_svg("a < b", 100, steps)
    assert funnel_lines(0, [])[-1].split() == ["kept", "0"]
