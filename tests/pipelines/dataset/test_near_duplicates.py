"""Perceptual hashes of changed images, and the search for pairs compared with brute force."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from pipelines.dataset.near_duplicates import near_pairs, winners
from pipelines.download.perceptual_hash import hash_grey, perceptual_hash


def distance(first: str, second: str) -> int:
    return (int(first, 16) ^ int(second, 16)).bit_count()


def scene(seed: int) -> Image.Image:
    """Smooth noise: the spectrum of a photograph, without its rights."""
    small = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC)


def saved(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream)


def test_a_hash_is_robust_to_size_quality_and_brightness_and_distinguishes_images() -> None:
    hashes = [perceptual_hash(scene(seed)) for seed in range(20)]
    for seed in range(20):
        image = scene(seed)
        for changed in (
            saved(image, 30),
            image.resize((97, 97), Image.Resampling.LANCZOS),
            ImageEnhance.Brightness(image).enhance(0.8),
        ):
            assert distance(perceptual_hash(changed), hashes[seed]) <= 4
    apart = [distance(hashes[i], hashes[j]) for i in range(20) for j in range(i)]
    assert min(apart) > 10
    assert distance(perceptual_hash(scene(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT)), hashes[0]) > 10


RECORDED = ["f1332e22a898fc75", "80aa00555555ff7f"]


def test_hashes_are_the_same_on_every_machine() -> None:
    row, column = np.indices((32, 32))
    grey = np.stack([(row * row * 7 + column * column * 13 + row * column * 5) % 256, (row * 9 + column * 31) % 256])
    assert [f"{value:016x}" for value in hash_grey(grey.astype(np.uint8)).tolist()] == RECORDED
    assert perceptual_hash(Image.fromarray(grey[1].astype(np.uint8))) == RECORDED[1]


def test_all_single_colours_except_black_have_the_same_hash() -> None:
    flat = np.repeat(np.arange(256, dtype=np.uint8), 32 * 32).reshape(256, 32, 32)
    assert set(hash_grey(flat[1:]).tolist()) == {1 << 63}
    assert hash_grey(flat[:1]).tolist() == [0]


def all_pairs(hashes: np.ndarray, most: int) -> list[tuple[int, int]]:
    near = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= most
    return [(int(i), int(j)) for i, j in np.argwhere(near) if i < j]


def clustered_hashes(num_groups: int, group_size: int, flips: int, seed: int) -> np.ndarray:
    """Groups of hashes around common centres, so that distances of every size up to twice `flips` occur."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, num_groups, dtype=np.uint64).repeat(group_size)
    for _ in range(flips):
        centres ^= np.uint64(1) << rng.integers(0, 64, len(centres), dtype=np.uint64)
    return rng.permutation(np.unique(centres))


@settings(max_examples=60, deadline=None)
@given(num_groups=st.integers(0, 12), group_size=st.integers(1, 20), flips=st.integers(0, 9), most=st.integers(0, 12),
       seed=st.integers(0, 9))  # fmt: skip
def test_pairs_are_those_of_comparing_all(num_groups: int, group_size: int, flips: int, most: int, seed: int) -> None:
    hashes = clustered_hashes(num_groups, group_size, flips, seed)
    first, second = near_pairs(hashes, most)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == all_pairs(hashes, most)


@pytest.mark.parametrize("most", [2, 4, 8])
def test_pairs_among_many_hashes_are_found_with_wider_blocks_too(most: int) -> None:
    hashes = clustered_hashes(700, 3, most // 2, seed=most)
    first, second = near_pairs(hashes, most)
    found = list(zip(first.tolist(), second.tolist(), strict=True))
    assert found == all_pairs(hashes, most) and len(found) > 500


@settings(max_examples=60, deadline=None)
@given(num_groups=st.integers(1, 6), group_size=st.integers(1, 12), flips=st.integers(0, 5), most=st.integers(0, 6))
def test_duplicates_are_near_their_winner_and_winners_are_not_near_each_other(
    num_groups: int, group_size: int, flips: int, most: int
) -> None:
    hashes = clustered_hashes(num_groups, group_size, flips, 1)
    hashes = np.concatenate([hashes, hashes[::2]])  # equal ones too
    of = winners(hashes, most)
    assert (np.bitwise_count(hashes ^ hashes[of]) <= most).all()
    assert (of <= np.arange(len(of))).all() and (of[of] == of).all()
    assert all_pairs(hashes[np.unique(of)], most) == []


def test_a_chain_falls_apart_into_stars() -> None:
    chain = np.array([0b0, 0b11, 0b1111, 0b111111], dtype=np.uint64)
    assert winners(chain, 2).tolist() == [0, 0, 2, 2]
    assert winners(chain[[1, 0, 2, 3]], 2).tolist() == [0, 0, 0, 3]
    assert winners(np.zeros(100_000, dtype=np.uint64), 3).max() == 0
