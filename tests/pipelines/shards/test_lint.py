"""`throughline lint` finds every kind of damage, and nothing in intact shards of ours or others."""

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset.writer import TarWriter

from orchestration.cli.main import main
from pipelines.core.config import FrozenConfig
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput
from pipelines.runner.units import StageRun
from pipelines.shards.format import ShardWriter
from pipelines.shards.lint import lint_folder
from pipelines.shards.lint_checks import KINDS, LintReport
from pipelines.shards.tar import DamagedTarError, walk
from tests.plain_stage import plain_stage

Members = list[tuple[str, bytes]]


def image_bytes(seed: int, image_format: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, image_format)
    return stream.getvalue()


def sample(key: str, seed: int = 0) -> Members:
    caption = f"čaj {key}"
    record = {"key": key.rpartition("/")[2], "caption": caption}
    return [
        (f"{key}.jpg", image_bytes(seed)),
        (f"{key}.json", json.dumps(record).encode()),
        (f"{key}.txt", caption.encode()),
    ]


def tar_bytes(members: Members, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5  # type: ignore[assignment]  # PAX writes fractions beside the header
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write(folder: Path, members: Members, name: str = "00000.tar") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(tar_bytes(members))
    return path


def kinds(report: LintReport) -> list[str]:
    return [finding.kind for finding in report.findings]


class _Config(FrozenConfig):
    keys: tuple[str, ...] = ("aa", "bb", "cc")


def our_shards(root: Path) -> StageOutput:
    def produce(run: StageRun[_Config]) -> None:
        for number, keys in enumerate((run.config.keys, ("dd",))):
            name = f"shard-{number:05d}.tar"
            with run.unit(f"{number:05d}") as unit:
                with unit.open(name, num_rows=len(keys)) as stream:
                    writer = ShardWriter(stream, name)
                    for seed, key in enumerate(keys):
                        writer.add(key, image_bytes(seed), f"čaj {key}", {"sample_key": key, "caption": f"čaj {key}"})
                    index = writer.finish()
                unit.write(f"shard-{number:05d}.index.json", index.to_bytes(), num_rows=len(keys))

    stage = plain_stage(name="shards", code_version="1", config_type=_Config, produce=produce)
    return stage.run(_Config(), {}, root, "00000")


def test_intact_shards_of_ours_and_others_have_no_findings(tmp_path: Path) -> None:
    our_shards(tmp_path)
    with TarWriter(str(tmp_path / "wds.tar")) as writer:
        for index in range(3):
            writer.write({"__key__": f"{index:05d}", "jpg": image_bytes(index), "txt": "t", "json": {"caption": "t"}})
    long_key = "folder/" + "x" * 180
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        (tmp_path / f"format-{tar_format}.tar").write_bytes(tar_bytes(sample(f"{long_key}-{tar_format}"), tar_format))
    (tmp_path / "packed.tar.gz").write_bytes(gzip.compress(tar_bytes(sample("packed"))))
    report = lint_folder(tmp_path, decode=True)
    assert report.findings == []
    assert (report.num_shards, report.num_samples, report.num_shards_with_digest) == (6, 10, 2)


def test_two_outputs_with_manifests_may_share_keys(tmp_path: Path) -> None:
    our_shards(tmp_path / "a")
    our_shards(tmp_path / "b")
    assert lint_folder(tmp_path).findings == []


def _cut(data: bytes) -> bytes:
    return data[: data.index(b"\xff\xd8\xff") + 100]


def _flip_header(data: bytes) -> bytes:
    place = data.rindex(b"ustar") - 200
    return data[:place] + b"\xff" + data[place + 1 :]


TAR_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut_short": _cut,
    "header": _flip_header,
    "no_end_mark": lambda data: data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512),
    "bytes_after_end": lambda data: data + data,
    "empty": lambda data: bytes(10_240),
}


@pytest.mark.parametrize("kind", TAR_DAMAGE)
def test_damage_of_the_tar_is_found_and_the_next_shard_is_still_read(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, sample("a1") + sample("a2"))
    path.write_bytes(TAR_DAMAGE[kind](path.read_bytes()))
    write(tmp_path, sample("b1") + sample("b2"), "00001.tar")
    report = lint_folder(tmp_path)
    assert kind in kinds(report)
    assert {finding.shard for finding in report.findings} == {"00000.tar"}
    assert report.num_samples >= 2


MEMBER_DAMAGE: dict[str, tuple[Members, str]] = {
    "unsafe_name": (sample("../up"), "../up.jpg"),
    "no_key": ([*sample("a1"), ("README", b"x")], "README"),
    "duplicate_member": ([*sample("a1"), sample("a1")[2]], "a1"),
    "split_sample": ([sample("a1")[0], *sample("a2"), *sample("a1")[1:]], "a1"),
    "missing_member": ([*sample("a1"), *sample("a2")[:2], *sample("a3")], "a2"),
    "json_unreadable": ([*sample("a1"), ("a2.jpg", image_bytes(0)), ("a2.json", b"{"), ("a2.txt", b"t")], "a2"),
    "text_unreadable": ([("a2.jpg", image_bytes(0)), ("a2.json", b"{}"), ("a2.txt", b"\xff\xfe")], "a2"),
    "caption_disagrees": ([("a2.json", b'{"caption": "one"}'), ("a2.txt", b"other")], "a2"),
    "key_disagrees": ([("a2.json", b'{"key": "a3"}'), ("a2.txt", b"other")], "a2"),
    "image_unreadable": ([("a2.jpg", b"\xff\xd8\xffnothing"), ("a2.txt", b"t")], "a2"),
    "image_suffix": ([("a2.jpg", image_bytes(0, "PNG")), ("a2.txt", b"t")], "a2"),
    "pickle": ([("a2.jpg", image_bytes(0)), ("a2.emb", pickle.dumps([1, 2]))], "a2"),
}


@pytest.mark.parametrize("kind", MEMBER_DAMAGE)
def test_damage_of_members_is_found_with_its_key_and_nothing_else(tmp_path: Path, kind: str) -> None:
    members, key = MEMBER_DAMAGE[kind]
    write(tmp_path, members)
    report = lint_folder(tmp_path)
    assert set(kinds(report)) == {kind}
    assert {(finding.shard, finding.key) for finding in report.findings} >= {("00000.tar", key)}


def test_links_are_found(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, kind in (("a1.jpg", tarfile.SYMTYPE), ("a1", tarfile.DIRTYPE), ("a1.txt", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO())
    report = lint_folder(tmp_path)
    assert [(item.kind, item.key, item.detail) for item in report.findings] == [
        ("not_a_file", "a1.jpg", "is a symbolic link")
    ]


def test_a_key_in_two_shards_names_both(tmp_path: Path) -> None:
    write(tmp_path / "x", sample("a1"))
    write(tmp_path / "y", sample("a1"))
    (finding,) = lint_folder(tmp_path).findings
    assert finding.line() == "y/00000.tar  a1  duplicate_key: also in x/00000.tar"


def test_torch_and_object_arrays_are_pickles_whatever_their_suffix(tmp_path: Path) -> None:
    saved, objects, numbers = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save([1], saved)
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    np.save(numbers, np.arange(3))
    write(tmp_path, [("a1.bin", saved.getvalue()), ("a1.npy", objects.getvalue()), ("a1.ok.npy", numbers.getvalue()),
                     ("a1.pkl", b"(lp0\n.")])  # fmt: skip
    assert [item.detail.split()[0] for item in lint_folder(tmp_path).findings] == ["bin", "npy", "pkl"]


def test_pixels_are_decoded_only_on_request(tmp_path: Path) -> None:
    write(tmp_path, [("a1.jpg", image_bytes(0)[:-100]), ("a1.txt", b"t")])
    assert lint_folder(tmp_path).findings == []
    (finding,) = lint_folder(tmp_path, decode=True).findings
    assert finding.kind == "image_unreadable" and "truncated" in finding.detail


OUR_DAMAGE: dict[str, Callable[[Path], object]] = {
    "hash_disagrees": lambda path: path.write_bytes(path.read_bytes().replace("čaj bb".encode(), "čaj b2".encode())),
    "index_disagrees": lambda path: path.with_name("shard-00000.index.json").write_bytes(
        path.with_name("shard-00001.index.json").read_bytes()
    ),
    "count_disagrees": lambda path: path.write_bytes((path.parent / "shard-00001.tar").read_bytes()),
    "unsorted": lambda path: path.write_bytes(tar_bytes(sample("bb") + sample("aa") + sample("cc"))),
    "file_missing": lambda path: path.unlink(),
    "file_unlisted": lambda path: path.with_name("stray.tar").write_bytes(tar_bytes(sample("zz"))),
    "manifest": lambda path: path.with_name("manifest.json").write_bytes(
        path.with_name("manifest.json").read_bytes().replace(b'"num_rows": 3', b'"num_rows": 4')
    ),
}


@pytest.mark.parametrize("kind", OUR_DAMAGE)
def test_damage_of_an_output_is_found_by_its_manifest(tmp_path: Path, kind: str) -> None:
    output = our_shards(tmp_path)
    assert lint_folder(tmp_path).findings == []
    OUR_DAMAGE[kind](output.path("shard-00000.tar"))
    assert kind in kinds(lint_folder(tmp_path))


def test_digests_in_the_json_and_a_changed_index_are_compared(tmp_path: Path) -> None:
    output = our_shards(tmp_path / "ours")
    path = output.path("shard-00000.tar")
    other = image_bytes(9).ljust(len(image_bytes(1)), b"\0")[: len(image_bytes(1))]
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / path.name).write_bytes(path.read_bytes().replace(image_bytes(1), other))
    (alone / "shard-00000.index.json").write_bytes(
        output.path("shard-00000.index.json").read_bytes().replace(b'"cc"', b'"cd"')
    )
    found = lint_folder(alone).findings
    assert [(item.kind, item.key) for item in found] == [("hash_disagrees", "bb"), ("index_disagrees", "cc")]
    assert "jpg does not have the image_sha256" in found[0].detail


def test_every_kind_of_finding_is_tested_here() -> None:
    elsewhere = {"not_a_file", "duplicate_key"}
    assert {*TAR_DAMAGE, *MEMBER_DAMAGE, *OUR_DAMAGE, *elsewhere} == set(KINDS)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10_239), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_tar_gives_members_or_one_error(place: int, byte: int, cut: bool) -> None:
    data = tar_bytes(sample("a1"))
    damaged = data[:place] if cut else data[:place] + bytes([byte]) + data[place + 1 :]
    try:
        members = list(walk(io.BytesIO(damaged)))
    except DamagedTarError as error:
        assert error.kind in KINDS
    else:
        assert len(members) == 3


def test_command_prints_findings_and_counts_and_exits_with_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, [("a1\x1b[2J.jpg", b""), ("a1\x1b[2J.txt", b"t")])
    with pytest.raises(SystemExit) as caught:
        main(["lint", str(tmp_path)])
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out
    first, counted, total = printed.out.splitlines()
    assert first.startswith("00000.tar  a1\\x1b[2J  image_unreadable: jpg: ")
    assert counted.startswith("1 shard, 1 sample, 2 members, ")
    assert total == "1 finding: image_unreadable 1"
    assert "1/1 shards" in printed.err
    with pytest.raises(SystemExit):
        main(["lint", str(tmp_path), "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["counts"] == {"image_unreadable": 1}
    assert record["findings"][0]["shard"] == "00000.tar"


def test_command_exits_with_zero_if_nothing_is_found(tmp_path: Path) -> None:
    write(tmp_path, sample("a1"))
    with pytest.raises(SystemExit) as caught:
        main(["lint", str(tmp_path)])
    assert caught.value.code == 0


def test_a_folder_without_tars_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ThroughlineError, match="no tars here"):
        lint_folder(tmp_path)
    with pytest.raises(ThroughlineError, match="no such folder"):
        lint_folder(tmp_path / "no")
