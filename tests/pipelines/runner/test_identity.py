import hashlib
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.core.atomic import atomic_writer, write_bytes, write_json
from pipelines.core.digest import HashingWriter, canonical_json, digest_json, file_sha256
from pipelines.core.sample_key import sample_key

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.text(), st.text(), st.text(), st.text())
def test_two_pairs_share_a_key_only_if_they_are_equal(url: str, text: str, other_url: str, other_text: str) -> None:
    assert (sample_key(url, text) == sample_key(other_url, other_text)) == ((url, text) == (other_url, other_text))


@given(st.text(min_size=1), st.text())
def test_moving_a_letter_from_url_to_text_changes_the_key(url: str, text: str) -> None:
    assert sample_key(url, text) != sample_key(url[:-1], url[-1] + text)


def test_sample_keys_are_the_same_on_every_machine_and_in_every_release() -> None:
    """Pinned: a changed key would orphan every manifest and ledger ever written."""
    assert sample_key("http://example.com/cat.jpg", "a cat ☕") == "1c8a87db3cfd56f8f9a7acecbb546567"


@given(st.dictionaries(st.text(), _json, max_size=6))
def test_digest_of_json_ignores_only_the_order_of_keys(value: dict[str, object]) -> None:
    assert digest_json(value) == digest_json(dict(reversed(value.items())))
    assert digest_json(value) != digest_json(value | {"another": 1, "key": value})


def test_digest_of_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_json({"loss": float("nan")})
    assert canonical_json({"b": 1, "a": "č"}) == '{"a":"č","b":1}'.encode()


@given(st.lists(st.binary(max_size=100)))
def test_hashing_writer_agrees_with_a_hash_of_all_bytes(chunks: list[bytes]) -> None:
    stream = io.BytesIO()
    writer = HashingWriter(stream)
    for chunk in chunks:
        writer.write(memoryview(chunk))
    assert writer.sha256 == hashlib.sha256(b"".join(chunks)).hexdigest()
    assert writer.num_bytes == len(stream.getvalue()) == sum(map(len, chunks))


def test_atomic_writer_shows_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"before")

    def write_half() -> None:
        with atomic_writer(path) as stream:
            stream.write(b"half of it")
            assert path.read_bytes() == b"before"
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_half()
    assert path.read_bytes() == b"before"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    with atomic_writer(path) as stream:
        stream.write(b"after")
    assert path.read_bytes() == b"after"
    assert file_sha256(path) == stream.sha256
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, [float("inf")])
    assert path.read_bytes() == b"after"


def test_a_temporary_file_left_by_a_kill_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file.tmp").write_bytes(b"stale, and longer than the new content")
    with atomic_writer(tmp_path / "file") as stream:
        stream.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
