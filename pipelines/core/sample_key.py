"""The identity of one image-text pair, from ingest to score."""

import hashlib

SAMPLE_KEY_BYTES = 16


def empty_digest() -> hashlib.blake2b:
    """Return the hash that a sample key is made with, before anything went in."""
    return hashlib.blake2b(digest_size=SAMPLE_KEY_BYTES, person=b"throughline-key1")


def sample_key(url: str, alt_text: str) -> str:
    """Return the 128-bit key of the pair (url, alt_text) as 32 lower-case hex digits.

    The length of the URL goes into the hash, so that no two different pairs share their concatenation.
    """
    url_bytes = url.encode("utf-8", "surrogatepass")
    digest = empty_digest()
    digest.update(len(url_bytes).to_bytes(8, "little"))
    digest.update(url_bytes)
    digest.update(alt_text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
