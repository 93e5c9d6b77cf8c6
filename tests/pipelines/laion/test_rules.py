"""Rules over labels, scores and lists; vectorised code against plain Python."""

import math
import re
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.core.errors import ThroughlineError
from pipelines.core.sample_key import sample_key
from pipelines.laion.config import LaionSubsetConfig
from pipelines.laion.duplicates import DuplicateFinder, _Table
from pipelines.laion.hashes import hex_keys, sample_keys, string_hashes
from pipelines.laion.rules import Rows, _is_blank, _is_http, _is_shorter, _num_words, rules_of
from pipelines.laion.sources import scan_entry_list
from tests.pipelines.laion.laion_world import drop_reasons, entry_list, kept_rows, run_subset, write_laion

JOINED = pa.schema(
    {
        "url": pa.string(),
        "text": pa.string(),
        "width": pa.int64(),
        "height": pa.int64(),
        "aesthetic": pa.float32(),
        "pwatermark": pa.float32(),
        "punsafe": pa.float32(),
        "LANGUAGE": pa.string(),
        "license": pa.string(),
        "clip_l14_similarity_score": pa.float32(),
        "hash": pa.int64(),
    }
)


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "url": f"http://h{number}.example.com/{number}.jpg",
        "text": "a red cat",
        "width": 640,
        "height": 480,
        "aesthetic": 5.5,
        "pwatermark": 0.25,
        "punsafe": 0.125,
        "LANGUAGE": "en",
        "license": "?",
        "clip_l14_similarity_score": 0.25,
        "hash": number,
    } | changes


def assert_outcome(tmp_path: Path, cases: list[tuple[dict[str, Any], str | None]], **rules: Any) -> None:
    """Assert that each row is kept or dropped for its expected reason."""
    source = write_laion(
        tmp_path / "laion" / "p.parquet", [row(i, **case) for i, (case, _) in enumerate(cases)], JOINED
    )
    output = run_subset(source.parent, tmp_path / "out", **rules)
    assert drop_reasons(output) == {index: reason for index, (_, reason) in enumerate(cases) if reason}
    assert len(kept_rows(output)) == sum(reason is None for _, reason in cases)


def test_scores_labels_and_words(tmp_path: Path) -> None:
    assert_outcome(
        tmp_path,
        [
            ({}, None),
            ({"text": "a b"}, "text_few_words"),
            ({"text": "a\u2003b\u00a0c"}, None),
            ({"text": "a b c d e f"}, "text_many_words"),
            ({"LANGUAGE": None}, "language_missing"),
            ({"LANGUAGE": "EN"}, None),
            ({"LANGUAGE": "de", "license": None}, "language"),
            ({"license": "cc"}, "license"),
            ({"clip_l14_similarity_score": 0.2}, "similarity_l14_low"),
            ({"aesthetic": math.nan}, "aesthetic_missing"),
            ({"aesthetic": 4.99, "punsafe": 1.0}, "aesthetic_low"),
            ({"aesthetic": 5.0}, None),
            ({"pwatermark": 0.5}, "pwatermark_high"),
            ({"pwatermark": None}, "pwatermark_missing"),
            ({"punsafe": 0.75}, "punsafe_high"),
        ],
        min_text_words=3,
        max_text_words=5,
        languages_allowed=("En",),
        licenses_allowed=("?",),
        min_similarity_l14=0.25,
        min_aesthetic=5.0,
        max_pwatermark=0.5,
        max_punsafe=0.5,
    )


def test_keep_missing_lets_missing_values_pass_scores_labels_and_conditions(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"LANGUAGE": None, "aesthetic": None, "pwatermark": math.nan}, None),
        ({"aesthetic": 1.0}, "aesthetic_low"),
        ({"hash": None}, None),
        ({"hash": -1}, "where"),
    ]
    rules: dict[str, Any] = {
        "languages_allowed": ("en",),
        "min_aesthetic": 5,
        "max_pwatermark": 0.5,
        "where": "hash>=0",
    }
    assert_outcome(tmp_path / "keep", cases, keep_missing=True, **rules)
    assert_outcome(tmp_path / "drop", [(cases[2][0], "where_unknown")], **rules)


def test_lists_of_urls_and_domains(tmp_path: Path) -> None:
    key = sample_key(row(7)["url"], row(7)["text"])
    assert_outcome(
        tmp_path,
        [
            ({}, None),
            ({}, "opted_out"),
            ({"url": "https://img.shop.example/x"}, "opted_out"),
            ({"url": "https://notshop.example/x"}, "domain_not_allowed"),
            ({}, "url_denied"),
            ({"url": "http://user@A.Bad.Example.com.:80/x"}, "domain_denied"),
            ({"url": "http://bad.example.com@good.example.com/x"}, None),
            ({}, "opted_out"),
        ],
        opt_outs=entry_list(
            tmp_path / "o.txt", "# by mail", "", "http://h1.example.com/1.jpg", "shop.example", key.upper()
        ),
        urls_denied=entry_list(tmp_path / "u.txt", "http://h4.example.com/4.jpg"),
        domains_denied=entry_list(tmp_path / "d.txt", "bad.example.com"),
        domains_allowed=entry_list(tmp_path / "a.txt", "Example.com"),
    )


def test_a_list_is_identified_by_content_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    here, there = (entry_list(tmp_path / name, "a.example") for name in ("here.txt", "there.txt"))
    source = write_laion(tmp_path / "laion" / "p.parquet", [row(0)], JOINED).parent
    first, second = (run_subset(source, tmp_path / "out", domains_denied=item) for item in (here, there))
    assert first.data_version == second.data_version
    (tmp_path / "here.txt").write_text("b.example\n")
    with pytest.raises(ThroughlineError, match=r"here.txt: SHA-256 .* the list has changed, set its new digest"):
        run_subset(source, tmp_path / "out", domains_denied=here, min_side_px=1)
    with pytest.raises(ThroughlineError, match=r"absent.txt: the list can't be read"):
        scan_entry_list(tmp_path / "absent.txt")


_texts = st.lists(st.none() | st.text(max_size=200), max_size=30)


@settings(max_examples=40, deadline=None)
@given(_texts, _texts)
def test_keys_of_a_batch_are_the_keys_of_its_rows(urls: list[str | None], texts: list[str | None]) -> None:
    pairs = list(zip(urls, texts, strict=False))
    keys = hex_keys(
        sample_keys(pa.array([u for u, _ in pairs], pa.string()), pa.array([t for _, t in pairs], pa.string()))
    )
    assert keys.to_pylist() == [sample_key(url or "", text or "") for url, text in pairs]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(alphabet="ab\0é", max_size=20), max_size=40), st.integers(0, 5))
def test_different_strings_have_different_hashes(strings: list[str], start: int) -> None:
    array = pa.array(["x", *strings], pa.string())[1:][start:]
    hashes = [tuple(item) for item in string_hashes(array).tolist()]
    assert len(set(hashes)) == len(set(array.to_pylist()))
    assert hashes == [tuple(string_hashes(pa.array([item]))[0].tolist()) for item in array.to_pylist()]


def _plain_hash(string: str) -> tuple[int, int]:
    data = string.encode()
    first = second = 0
    for place in range(len(data) // 8 + 1):
        weight = (place + 1) * 0x9E3779B97F4A7C15 % 2**64
        word = _plain_mix((int.from_bytes(data[8 * place : 8 * place + 8], "little") + weight) % 2**64)
        first, second = first + word, second + word * (weight | 1)
    return _plain_mix((first + len(data)) % 2**64), _plain_mix((second + len(data)) % 2**64)


def _plain_mix(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=40) | st.integers(495, 530).map("x".__mul__) | st.none()), st.randoms())
def test_hashes_of_short_and_long_strings_equal_a_plain_loop(strings: list[str | None], random: Random) -> None:
    rows = [row for row in range(len(strings)) if random.random() < 0.5]
    array, expected = pa.array(strings, pa.string()), [_plain_hash(string or "") for string in strings]
    assert [tuple(item) for item in string_hashes(array).tolist()] == expected
    some = string_hashes(array, np.array(rows, np.int64))
    assert [tuple(item) for item in some.tolist()] == [expected[row] for row in rows]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="hHtTpPsS:/?# \té.\0", max_size=12) | st.sampled_from(["http://é", "https://x", ""])))
def test_the_fast_url_check_equals_the_regular_expression(urls: list[str]) -> None:
    pattern = re.compile(r"(?i)https?://[^/?#\t\n\f\r ]")
    assert _is_http(pa.array(urls, pa.string())).tolist() == [bool(pattern.match(url)) for url in urls]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="a\u00e9 \t\n\v\x1c\x85\xa0\u2003\u3000\u200b", max_size=8)))
def test_blank_texts_and_word_counts_equal_python(texts: list[str]) -> None:
    array = pa.array(texts, pa.string())
    assert _is_blank(array).tolist() == [not text.strip() for text in texts]
    assert _num_words(array).to_pylist() == [len(text.split()) for text in texts]
    for start in (0, len(texts) // 2):
        for num_chars in (1, 3, 7):
            shorter = _is_shorter(array[start:], num_chars).tolist()
            assert shorter == [len(text) < num_chars for text in texts[start:]]


_sides = st.lists(st.none() | st.sampled_from([math.nan, -300.0, -1.0, 0.0]) | st.integers(1, 900).map(float))


@settings(max_examples=60, deadline=None)
@given(_sides, _sides)
def test_size_rules_equal_a_plain_loop(widths: list[float | None], heights: list[float | None]) -> None:
    pairs = list(zip(widths, heights, strict=False))
    width, height = (pa.array([pair[place] for pair in pairs], pa.float64(), from_pandas=False) for place in (0, 1))
    rows = Rows(pa.record_batch({"width": width, "height": height}), np.empty((len(pairs), 16), np.uint8))
    rules = rules_of(LaionSubsetConfig(min_side_px=256, max_aspect=3, keep_missing=True))
    small, extreme = ({rule.reason: rule for rule in rules}[reason] for reason in ("too_small", "aspect_extreme"))
    known = [[side for side in pair if side is not None and not math.isnan(side)] for pair in pairs]
    assert small.drops(rows).tolist() == [min(sides, default=256) < 256 for sides in known]
    whole = [(min(sides), max(sides)) if len(sides) == 2 else (1.0, 1.0) for sides in known]
    assert extreme.drops(rows).tolist() == [long > 0 if short == 0 else long / short > 3 for short, long in whole]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), max_size=120), st.integers(1, 40), st.booleans())
def test_duplicates_equal_a_plain_loop(pairs: list[tuple[int, int]], batch: int, by_url: bool) -> None:
    urls, texts = [f"http://a.example/{url}" for url, _ in pairs], [str(text) for _, text in pairs]
    keys = sample_keys(pa.array(urls, pa.string()), pa.array(texts, pa.string()))
    finder, found = DuplicateFinder(by_url, len(pairs)), []
    for start in range(0, len(pairs), batch):
        same_pair, same_url = finder.find(
            keys[start : start + batch], pa.array(urls[start : start + batch], pa.string())
        )
        found += ["pair" if pair else "url" if url else None for pair, url in zip(same_pair, same_url, strict=True)]
    kept_pairs, kept_urls, expected = set(), set(), []
    for pair in pairs:
        word = "pair" if pair in kept_pairs else "url" if by_url and pair[0] in kept_urls else None
        if word is None:
            kept_pairs.add(pair)
            kept_urls.add(pair[0])
        expected.append(word)
    assert found == expected


def test_duplicates_are_found_while_the_table_fills() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.permutation(np.append(np.arange(12_500), rng.integers(0, 12_500, 500)))  # 0.76 of 2**14 slots
    urls = pa.array(numbers.astype(str))
    keys = sample_keys(urls, pa.array(["x"] * len(urls)))
    finder, kept = DuplicateFinder(True, len(urls)), []
    for start in range(0, len(urls), 1000):
        same_pair, same_url = finder.find(keys[start : start + 1000], urls[start : start + 1000])
        assert not same_url.any()
        kept += (np.flatnonzero(~same_pair) + start).tolist()
    assert kept == np.sort(np.unique(numbers, return_index=True)[1]).tolist()


def test_unselected_rows_are_neither_duplicates_nor_originals() -> None:
    urls = pa.array(["a", "b", "a", "b", "a", "b"])
    keys = sample_keys(urls, pa.array(["1", "1", "1", "2", "2", "2"]))
    finder = DuplicateFinder(True, len(urls))
    same_pair, same_url = finder.find(keys, urls, np.array([2, 3, 4, 5]))
    assert (same_pair.tolist(), same_url.tolist()) == ([False, False, False, True], [False, False, True, False])


def test_hashes_that_agree_in_a_slot_are_distinguished() -> None:
    table = _Table(8)
    rows = np.array([[1 << 40 | 5, 1, 10], [1 << 40 | 5, 2, 20], [1 << 40 | 1 << 31 | 5, 1, 30]], np.uint64)
    new, held = table.put(rows)
    assert (new.tolist(), held.tolist()) == ([True, True, True], [10, 20, 30])
    again = rows[::-1].copy()
    again[:, 2] = 99
    new, held = table.put(again)
    assert (new.tolist(), held.tolist()) == ([False, False, False], [30, 20, 10])
