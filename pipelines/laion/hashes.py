"""Vectorised hashing: sample keys of a whole batch, and 128-bit hashes of strings.

`pipelines.core.sample_key` defines the sample key; this computes the same for arrays, without a Python string per row.
"""

# pyarrow.compute makes its functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.core.sample_key import SAMPLE_KEY_BYTES, empty_digest

_HEX_DIGITS = 2 * SAMPLE_KEY_BYTES
_WORD_BYTES = 8
# Rows hashed at a time, so that they stay in the CPU cache.
_CHUNK_ROWS = 4096
# malloc maps arrays of twice this size afresh on each call, which doubles the cost of a hash.
_HASHED_ROWS = 16_384
# URLs of more than 512 bytes are rare.
_MOST_WORDS = 64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LOW_BYTES = np.array([(1 << 8 * count) - 1 for count in range(_WORD_BYTES)], np.uint64)


def fill_missing(strings: pa.Array) -> pa.Array:
    """Return strings with null replaced by the empty string; without nulls the array itself, not a copy."""
    return pc.fill_null(strings, "") if strings.null_count else strings


def sample_keys(urls: pa.Array, texts: pa.Array) -> np.ndarray:
    """Return the sample keys of the pairs (url, text) as uint8 [rows, 16]; null counts as the empty string."""
    urls, texts = (fill_missing(item).cast(pa.binary()) for item in (urls, texts))
    lengths = pc.binary_length(urls).to_numpy(zero_copy_only=False).astype("<u8")
    prefixes = pa.Array.from_buffers(pa.binary(8), len(urls), [None, pa.py_buffer(lengths)]).cast(pa.binary())
    # Copying a configured digest costs two thirds of making a new one.
    copy, digests = empty_digest().copy, []
    for start in range(0, len(urls), _CHUNK_ROWS):
        some = slice(start, start + _CHUNK_ROWS)
        hashed = pc.binary_join_element_wise(prefixes[some], urls[some], texts[some], b"")
        for data in hashed.to_numpy(zero_copy_only=False).tolist():
            digest = copy()
            digest.update(data)
            digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, SAMPLE_KEY_BYTES)


def hex_keys(keys: np.ndarray) -> pa.StringArray:
    """Return keys, uint8 [rows, 16], as strings of 32 lower-case hex digits."""
    data = np.ascontiguousarray(keys).tobytes().hex().encode()
    offsets = np.arange(0, len(data) + 1, _HEX_DIGITS, dtype=np.int32)
    return pa.StringArray.from_buffers(len(keys), pa.py_buffer(offsets), pa.py_buffer(data))


def parse_hex_keys(keys: pa.Array) -> np.ndarray:
    """Return keys given as 32 hex digits as uint8 [rows, 16]; none may be null."""
    digits = "".join(keys.to_pylist()) if len(keys) else ""
    return np.frombuffer(bytes.fromhex(digits), np.uint8).reshape(-1, SAMPLE_KEY_BYTES)


def key_words(keys: np.ndarray) -> np.ndarray:
    """Return keys, uint8 [rows, 16], as big-endian numbers uint64 [rows, 2], which sort as the hex digits do."""
    return np.ascontiguousarray(keys).view(">u8").astype(np.uint64)


def key_ranks(words: np.ndarray, salt: str) -> np.ndarray:
    """Return the hash rank uint64 [rows] of keys uint64 [rows, 2]: a number that depends on key and salt alone."""
    first = np.uint64(int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "little"))
    return _mixed(words[:, 0] + first)


def string_hashes(values: pa.Array, rows: np.ndarray | None = None) -> np.ndarray:
    """Return a 128-bit hash of each string as uint64 [rows, 2]; null hashes as the empty string.

    `rows`, int64 in ascending order, selects the strings to hash; None selects all.

    Every eight bytes, with a constant for their position, go through a 64-bit finaliser (Stafford's mix 13). The first
    word is the sum of the results, the second their sum weighted by position, each mixed with the length. The
    probability that any two of 400 million strings collide is below 2**-70; the hash does not resist deliberate
    collisions.
    """
    values = fill_missing(values).cast(pa.large_binary())
    offsets = np.frombuffer(values.buffers()[1], np.int64)[values.offset : values.offset + len(values) + 1]
    data = np.frombuffer(values.buffers()[2] or b"", np.uint8)
    begins, lengths = offsets[:-1], np.diff(offsets)
    if rows is not None:
        begins, lengths = begins[rows], lengths[rows]
    hashes = np.empty((len(begins), 2), np.uint64)
    for row in range(0, len(begins), _HASHED_ROWS):
        some = slice(row, row + _HASHED_ROWS)
        first, end = begins[some][0], begins[some][-1] + lengths[some][-1]
        hashes[some] = _chunk_hashes(data[first:end], begins[some] - first, lengths[some])
    return hashes


def _chunk_hashes(data: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Hash strings in one contiguous buffer, one word of all strings at a time, in order of length."""
    padded = np.zeros(len(data) // _WORD_BYTES + 2, "<u8")
    padded.view(np.uint8)[: len(data)] = data
    counts = np.minimum(lengths // _WORD_BYTES + 1, _MOST_WORDS + 1)  # the last word holds 0 to 7 bytes of the string
    order = np.argsort(counts.astype(np.uint8), kind="stable")
    begins, lengths = begins[order], lengths[order]
    low_bytes = _LOW_BYTES[lengths % _WORD_BYTES]
    ends = np.cumsum(np.bincount(counts, minlength=_MOST_WORDS + 2))
    num_short = ends[_MOST_WORDS]
    sums = np.zeros((2, len(order)), np.uint64)
    # An unaligned word spans two aligned ones, and the second is the first of the next word: fetching each aligned word
    # once costs half of unaligned reads.
    places = begins // _WORD_BYTES
    down = (begins % _WORD_BYTES).astype(np.uint64) * np.uint64(8)
    up = np.uint64(63) - down
    lower = padded.take(places)
    for number in range(_MOST_WORDS):
        begin, end = ends[number], ends[number + 1]
        if begin == num_short:
            break
        rest = slice(begin, num_short)
        places[rest] += 1
        upper = padded.take(places[rest])
        words = lower[rest] >> down[rest]
        lower[rest] = upper
        upper <<= np.uint64(1)
        upper <<= up[rest]
        words |= upper
        words[: end - begin] &= low_bytes[begin:end]  # the last word of these strings
        weight = np.uint64((number + 1) * int(_GOLDEN) % (1 << 64))
        words += weight
        words = _mixed(words)
        sums[0, rest] += words
        words *= weight | np.uint64(1)
        sums[1, rest] += words
    if num_short < len(order):
        sums[:, num_short:] = _sums_of_long(padded.view(np.uint8), begins[num_short:], lengths[num_short:])
    hashes = np.empty((len(order), 2), np.uint64)
    hashes[order] = _mixed(sums + lengths.astype(np.uint64)).T
    return hashes


def _sums_of_long(data: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the sums uint64 [2, strings] of strings of any length; each word costs twice as much, but no work is spent
    on positions that few strings reach. `data` is padded by eight bytes."""
    windows = np.lib.stride_tricks.as_strided(data[:_WORD_BYTES].view("<u8"), (len(data) - _WORD_BYTES + 1,), (1,))
    counts = lengths // _WORD_BYTES + 1
    ends = np.cumsum(counts)
    index = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
    words = windows[np.repeat(begins, counts) + index * _WORD_BYTES].astype(np.uint64)
    words[ends - 1] &= _LOW_BYTES[lengths % _WORD_BYTES]
    weights = (index.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    words = _mixed(words + weights)
    firsts = np.add.reduceat(words, ends - counts)
    return np.stack([firsts, np.add.reduceat(words * (weights | np.uint64(1)), ends - counts)])


def _mixed(words: np.ndarray) -> np.ndarray:
    """Return a bijective mix of 64-bit words: every output bit depends on every input bit."""
    shifted = words >> np.uint64(30)
    words = words ^ shifted
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= np.right_shift(words, np.uint64(27), out=shifted)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= np.right_shift(words, np.uint64(31), out=shifted)
    return words
