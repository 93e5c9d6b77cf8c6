import pytest
from hypothesis import given
from hypothesis import strategies as st

from recaption.checks import FLAGS, caption_flags, count_flags, repeated_share
from recaption.config import CaptionCheckConfig

CHECKS = CaptionCheckConfig()
GOOD = "Two red dogs stand left of a blue house on a green background, under one yellow star."


@pytest.mark.parametrize(
    ("caption", "finish_reason", "flags"),
    [
        (GOOD, "stop", []),
        ("", "stop", ["empty"]),
        (" \n", "length", ["empty"]),
        ("...!", "stop", ["empty"]),
        (GOOD, "length", ["truncated"]),
        ("A dog.", "stop", ["too_short"]),
        ("I'm sorry, but I can't help with that image at all.", "stop", ["refusal"]),
        ("I’m unable to describe the content of this picture.", "stop", ["refusal"]),
        ("I cannot describe this image because it shows a person.", "stop", ["refusal"]),
        ("As an AI language model, I have no way to see this.", "stop", ["refusal"]),
        ("A poster that reads 'I'm sorry, I cannot come' hangs on a white wall.", "stop", []),
        ("Ich kann dieses Bild sehr gut sehen und beschreiben.", "stop", []),
        ("a red dog and a red dog and a red dog and a red dog and a red dog", "length", ["truncated", "repetition"]),
    ],
)
def test_flags(caption, finish_reason, flags):
    assert caption_flags(caption, finish_reason, CHECKS) == flags


@pytest.mark.slow
@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 5))
def test_repeated_share_is_zero_only_without_repeats(words, ngram_words):
    share = repeated_share(words, ngram_words)
    assert 0.0 <= share < 1.0
    ngrams = [tuple(words[i : i + ngram_words]) for i in range(len(words) - ngram_words + 1)]
    assert (share == 0.0) == (len(ngrams) == len(set(ngrams)))


def test_counts_include_every_flag():
    assert count_flags([["empty"], [], ["empty"]]) == dict.fromkeys(FLAGS, 0) | {"empty": 2}
