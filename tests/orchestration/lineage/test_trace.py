import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestration.cli.main import main
from orchestration.cli.trace import is_append_only_edit, trace_lines
from orchestration.lineage.trace import Outputs, Trace, TracedOutput, trace
from pipelines.core.sample_key import sample_key
from pipelines.dataset import dataset
from pipelines.dataset.config import DatasetConfig
from pipelines.laion.block_lists import OptOuts
from pipelines.laion.sources import scan_entry_list
from pipelines.runner.outputs import StageOutput
from pipelines.runner.units import StageRun
from pipelines.shards import shards
from pipelines.shards.config import ShardsConfig
from tests.evaluation.worlds import StandInConfig, run_stand_in
from tests.pipelines.download.hostile_server import HostileServer
from tests.pipelines.laion.laion_world import laion_row, run_captions, run_images, run_subset, write_laion
from tests.pipelines.storage.store_stage import mirrored

DRAWN, HELD, TWICE, LOST = "/scene/0", "/scene/1", "/scene/5", "/404"
"""Consumed by a checkpoint; in the data set but never consumed; in both parts; a dead link."""


class World:
    """Outputs of two parts, a data set, a checkpoint that consumed a row and one that did not, and samples of both."""

    def __init__(self, server: HostileServer, root: Path) -> None:
        self.server, self.root = server, root / "out"
        for part in range(2):
            rows = [
                laion_row(server.url(f"/scene/{number}"), f"text {number}") for number in range(part * 5, 6 + part * 5)
            ]
            rows += [laion_row(server.url(LOST), "lost")] if part == 0 else []
            write_laion(root / "laion" / f"{part:05d}.parquet", rows)
        self.shards, self.latents = [], []
        for part in ("00000", "00001"):
            subset = run_subset(root / "laion", self.root, part)
            images = run_images(server, subset, self.root)
            captions = run_captions(images, self.root)
            tars = shards.STAGE.run(ShardsConfig(), {"images": [images], "captions": [captions]}, self.root, part)
            self.shards.append(tars)
            self.latents.append(run_stand_in(self.root, "latents", _nothing, {"shards": [tars]}, part))
        self.dataset = dataset.STAGE.run(DatasetConfig(), {"shards": self.shards}, self.root)
        for strategy, drawn in (("joint", {self.key(DRAWN): (3, 2)}), ("uniform", {self.key("/scene/2"): (0, 1)})):
            checkpoint = run_stand_in(self.root, "checkpoint", _ledger(drawn), {"dataset": [self.dataset]}, strategy)
            samples = run_stand_in(self.root, "samples", _nothing, {"checkpoint": [checkpoint]}, f"{strategy}|geneval")
            run_stand_in(self.root, "scores", _nothing, {"samples": [samples]}, f"{strategy}|geneval")

    def key(self, path: str) -> str:
        text = "lost" if path == LOST else f"text {path.rpartition('/')[2]}"
        return sample_key(self.server.url(path), text)

    def trace(self, *entries: str) -> Trace:
        outputs = Outputs.load(self.root)
        return trace(outputs, entries, outputs.in_use([self.dataset.ref]))


def _nothing(run: StageRun[StandInConfig]) -> None:
    with run.unit("all") as unit:
        unit.write("file", b"")


def _ledger(drawn: dict[str, tuple[int, int]]) -> Callable[[StageRun[StandInConfig]], None]:
    def produce(run: StageRun[StandInConfig]) -> None:
        first, times = zip(*drawn.values(), strict=True)
        with run.unit("all") as unit, unit.open("ledger.parquet") as stream:
            pq.write_table(pa.table({"sample_key": list(drawn), "first_step": first, "times_seen": times}), stream)

    return produce


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with HostileServer() as server:
        yield World(server, tmp_path_factory.mktemp("trace"))


def labels(holders: list[TracedOutput]) -> list[str]:
    return [holder.label for holder in holders]


def drops(found: Trace) -> dict[tuple[str, str], str]:
    return {(drop.holder.label, drop.sample_key): drop.reason for drop in found.drops}


def test_a_row_is_traced_from_its_url_to_the_scores_of_the_checkpoint_that_consumed_it(world: World) -> None:
    found = world.trace(world.server.url(DRAWN))
    key = world.key(DRAWN)
    assert list(found.rows) == [key]
    assert (found.rows[key].url, found.rows[key].alt_text) == (world.server.url(DRAWN), "text 0")
    assert labels(found.holders) == [
        "laion_subset 00000", "images 00000", "captions 00000", "shards 00000", "latents 00000", "dataset",
        "checkpoint joint", "samples joint|geneval", "scores joint|geneval",
    ]  # fmt: skip
    files = {holder.label: dict(holder.files) for holder in found.holders}
    assert files["images 00000"] == {"images-00000.parquet": 1}
    assert files["shards 00000"] == {"shard-00000.tar": 1}
    assert files["latents 00000"] == {"latents-00000.safetensors": 1}
    assert files["samples joint|geneval"] == {}
    notes = {holder.label: holder.notes.get(key) for holder in found.holders}
    assert notes["checkpoint joint"] == {"first_step": 3, "times_seen": 2}
    assert notes["dataset"] == {"split": "train", "part": "00000", "shard": "shard-00000.tar"}
    assert [holder.label for holder in found.holders if not holder.is_current] == [
        "latents 00000", "checkpoint joint", "samples joint|geneval", "scores joint|geneval"
    ]  # fmt: skip
    assert not (found.unknown or found.drops or found.unreadable)


def test_a_row_that_no_checkpoint_consumed_affects_none(world: World) -> None:
    found = world.trace(world.key(HELD))
    assert labels(found.holders)[-1] == "dataset"


def test_a_dropped_row_is_reported_with_its_reason(world: World) -> None:
    found = world.trace(world.server.url(LOST))
    assert labels(found.holders) == ["laion_subset 00000"]
    assert drops(found) == {("images 00000", world.key(LOST)): "http_not_found"}
    found = world.trace(world.key(TWICE))
    assert labels(found.holders)[:2] == ["laion_subset 00000", "laion_subset 00001"]
    assert drops(found) == {("dataset", world.key(TWICE)): "duplicate_key"}
    assert "dropped: 1 by dataset (duplicate_key)" in "\n".join(trace_lines(found))


def test_a_domain_matches_all_its_rows_and_entries_without_a_match_are_reported(world: World) -> None:
    host = world.server.url("/").split("/")[2].partition(":")[0]
    unknown = ["example.org", "http://example.org/a.jpg", "0" * 32]
    found = world.trace(host, *unknown)
    assert len(found.rows) == 12
    assert found.unknown == unknown
    nothing = world.trace("example.org")
    assert not (nothing.rows or nothing.holders)
    assert next(trace_lines(nothing)) == "0 rows, so there is nothing to report"


@pytest.fixture
def copied(world: World, tmp_path: Path) -> Path:
    """A copy of the outputs that a test may damage."""
    return shutil.copytree(world.root, tmp_path / "copied")


def folder_of(root: Path, stage: str, partition: str | None = None) -> Path:
    outputs = Outputs.load(root).by_stage[stage]
    return next(output.folder for output in outputs if output.manifest.partition == partition)


def test_an_output_that_cannot_be_searched_is_reported_with_all_its_descendants(world: World, copied: Path) -> None:
    manifest = folder_of(copied, "dataset") / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"num_samples": ', b'"num_samples": 1'))
    (folder_of(copied, "checkpoint", "joint") / "ledger.parquet").write_bytes(b"no table")
    shutil.rmtree(folder_of(copied, "shards", "00000"))
    found = trace(Outputs.load(copied), [world.key(DRAWN)])
    assert labels(found.holders) == ["laion_subset 00000", "images 00000", "captions 00000"]
    named = [problem.split(" ")[0:2] for problem in found.unreadable[1:]]
    assert named == [
        ["latents", "00000"],
        ["checkpoint", "joint"],
        ["samples", "joint|geneval"],
        ["scores", "joint|geneval"],
    ]
    assert "was altered" in found.unreadable[0]
    said = "\n".join(trace_lines(found))
    assert "could not be read: latents 00000" in said
    assert "which is gone or could not be searched" in said
    assert "Unknown which of these the profile uses" in said


def test_rows_found_before_an_error_are_kept(world: World, copied: Path) -> None:
    dropped = folder_of(copied, "images", "00000") / "dropped.parquet"
    dropped.write_bytes(b"no table")
    found = trace(Outputs.load(copied), [world.key(DRAWN)])
    assert labels(found.holders) == labels(world.trace(world.key(DRAWN)).holders)
    assert len(found.unreadable) == 1 and found.unreadable[0].startswith("images 00000")


@pytest.mark.slow
@pytest.mark.usefixtures("s3")
def test_only_tables_and_indexes_are_downloaded_from_an_object_store(bucket: str, tmp_path: Path) -> None:
    mirrored(tmp_path / "here" / "out", bucket)
    with HostileServer() as server:
        world = World(server, tmp_path / "here")
        there = mirrored(tmp_path / "there", bucket)
        found = trace(Outputs.load(there), [world.key(DRAWN)])
        assert labels(found.holders) == labels(world.trace(world.key(DRAWN)).holders)
    fetched = {path.name for output in there.glob("*/*/manifest.json") for path in output.parent.iterdir()}
    assert fetched == {
        "manifest.json", "rows.parquet", "status-00000.parquet", "dropped.parquet", "captions-00000.parquet",
        "shard-00000.index.json", "samples.parquet", "ledger.parquet",
    }  # fmt: skip
    assert len(list(there.glob("shards/*/*.index.json"))) == 1, "the other part's images do not have the row"


def test_an_earlier_output_that_a_current_one_extends_is_in_use(tmp_path: Path) -> None:
    before = run_stand_in(tmp_path, "images", _nothing, partition="00000")
    alone = run_stand_in(tmp_path, "images", _nothing, partition="00001")
    after = run_stand_in(tmp_path, "images", _nothing, {"earlier": [before]}, "00000")
    index = run_stand_in(tmp_path, "laion_index", _nothing)
    subset = run_stand_in(tmp_path, "laion_subset", _nothing, {"index": [index.only_file("file")], "images": [after]})
    in_use = Outputs.load(tmp_path).in_use([subset.ref])
    assert ("images", alone.data_version) not in in_use
    assert {version for _, version in in_use} == {item.data_version for item in (before, after, index, subset)}


def test_text_from_the_web_is_escaped_on_one_line(tmp_path: Path) -> None:
    url = "http://a.example/x\ny.jpg\u2028"
    write_laion(tmp_path / "laion" / "00000.parquet", [laion_row(url, "red \x1b[31mcat")])
    run_subset(tmp_path / "laion", tmp_path / "out", "00000")
    found = trace(Outputs.load(tmp_path / "out"), ["a.example"])
    row = list(trace_lines(found))[1]
    assert row.split()[1] == r'"http://a.example/x\ny.jpg\u2028"'
    assert "\x1b" not in row


@pytest.mark.parametrize(
    ("data", "grown"),
    [(b"a\nb\n", True), (b"a\nb\nc\n", True), (b"a\n", False), (b"x\na\nb\n", False), (b"a\nbc\n", False)],
)
def test_a_list_has_grown_if_it_starts_with_its_earlier_lines(data: bytes, grown: bool) -> None:
    assert is_append_only_edit(data, hashlib.sha256(b"a\nb\n").hexdigest()) is grown
    assert is_append_only_edit(data, hashlib.sha256(b"a\nb").hexdigest()) is grown


def run_cli(*arguments: str) -> object:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


@pytest.fixture
def root(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.setenv("THROUGHLINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home" / "dagster"))
    return "--output-root", str(world.root)


def test_withdrawn_rows_are_listed_once_under_their_urls(
    world: World, root: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed, asked = tmp_path / "withdrawn.txt", tmp_path / "asked.txt"
    listed.write_text(f"# first\n{world.key(HELD)}")
    asked.write_text(f"{world.server.url(DRAWN)}\n{world.key(HELD)}\n")
    assert run_cli("withdraw", "--from", str(asked), "--list", str(listed), *root) == 0
    expected = f"# first\n{world.key(HELD)}\n# {world.server.url(DRAWN)}\n{world.key(DRAWN)}\n"
    assert listed.read_text() == expected
    said = capsys.readouterr().out
    entry = scan_entry_list(listed)
    assert f'withdrawn = {{ path = "{listed}", sha256 = "{entry.sha256}" }}' in said
    assert "1 row added, 2 in total" in said
    assert "drawn 2 times, first in step 3" in said
    assert "derived from these: samples (1), scores (1)" in said
    assert "dataset, checkpoint (" in said
    assert "shards (" not in said
    assert run_cli("withdraw", world.server.url(DRAWN), "--list", str(listed), "--json", *root) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["withdrawn"] == {**entry.model_dump(), "num_new": 0, "num_listed": 2}
    assert record["made_anew"] == {}
    assert listed.read_text() == expected
    assert OptOuts.read(entry).keys == (world.key(HELD), world.key(DRAWN))


def test_a_profile_has_one_list_of_withdrawn_rows(
    world: World, root: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "withdrawn.txt"
    assert "name one: --list" in str(run_cli("withdraw", world.key(HELD), *root))
    assert "nothing was withdrawn" in str(run_cli("withdraw", "example.org", "--list", str(listed), *root))
    assert not listed.exists()
    listed.write_text(f"{world.key(HELD)}\n")
    digest = scan_entry_list(listed).sha256
    named = ("--set", f'dataset.withdrawn={{"path": "{listed}", "sha256": "{digest}"}}')
    other = ("--list", str(tmp_path / "other.txt"))
    assert "omit --list" in str(run_cli("withdraw", world.key(DRAWN), *other, *named, *root))
    assert run_cli("withdraw", world.key(DRAWN), *named, *root) == 0
    assert world.key(DRAWN) in listed.read_text()
    assert run_cli("withdraw", world.key(TWICE), *named, *root) == 0, "the profile may name its earlier state"
    assert run_cli("status", *named, *root) == 0
    present = scan_entry_list(listed).sha256
    assert f"but it has SHA-256 {present}; update the profile" in capsys.readouterr().err
    listed.write_text(f"{world.key(DRAWN)}\n")
    assert "appended, found another one" in str(run_cli("withdraw", world.key(TWICE), *named, *root))
    listed.unlink()
    assert "appended, found none" in str(run_cli("withdraw", world.key(TWICE), *named, *root))
    assert not listed.exists()
    assert "not a file" in str(run_cli("withdraw", world.key(TWICE), "--list", "/dev/null", *root))


def test_rows_must_be_named(root: tuple[str, ...]) -> None:
    assert "name at least one row" in str(run_cli("trace", *root))


def test_a_withdrawn_row_leaves_the_data_set_and_a_url_is_no_key(world: World, tmp_path: Path) -> None:
    def run(*lines: str) -> StageOutput:
        (tmp_path / "list").write_text("\n".join(lines))
        config = DatasetConfig(withdrawn=scan_entry_list(tmp_path / "list"))
        return dataset.STAGE.run(config, {"shards": world.shards}, tmp_path / "out")

    manifest = run(world.key(TWICE), "f" * 32).manifest
    assert manifest.conservation is not None
    assert manifest.conservation.dropped == {"withdrawn": 2}, "one in each part"
    found = trace(Outputs.load(tmp_path / "out"), [world.key(TWICE)])
    assert [drop.detail for drop in found.drops] == [f"shard-00000.tar of part {part}" for part in ("00000", "00001")]
    with pytest.raises(Exception, match=r"'example.org' is not a sample key"):
        run(world.key(TWICE), "example.org")
