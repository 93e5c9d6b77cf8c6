import hashlib
import json
import re
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.core.config import FrozenConfig, identity_of
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import Conservation, damaged_files
from pipelines.core.sample_key import sample_key
from pipelines.download import images
from pipelines.download.config import FetchConfig, ImagesConfig
from pipelines.download.passes import read_shards
from pipelines.download.tables import image_units
from pipelines.runner.outputs import StageOutput
from pipelines.runner.units import StageRun
from tests.pipelines.download.hostile_server import JPEG, HostileServer
from tests.pipelines.laion.laion_world import (
    entry_list,
    images_config,
    laion_row,
    run_images,
    run_subset,
    start_images,
    write_laion,
)
from tests.plain_stage import plain_stage


def subset_of(urls: list[str], folder: Path) -> StageOutput:
    rows = [laion_row(url, f"text {index}") for index, url in enumerate(urls)]
    return run_subset(
        write_laion(folder / "laion" / "00000.parquet", rows).parent, folder / "out", drop_duplicate_urls=False
    )


def test_shards_are_cut_by_row_whatever_the_row_groups(server: HostileServer, tmp_path: Path) -> None:
    table = pq.read_table(
        subset_of([server.url(f"/scene/{index}") for index in range(25)], tmp_path).path("rows.parquet")
    )
    cuts = []
    for row_group_size in (3, 25):
        pq.write_table(table, tmp_path / "rows.parquet", row_group_size=row_group_size)
        cuts.append([(name, [row.url for row in rows]) for name, rows in read_shards(tmp_path / "rows.parquet", 10)])
    assert cuts[0] == cuts[1]
    assert [(name, len(urls)) for name, urls in cuts[0]] == [("00000", 10), ("00001", 10), ("00002", 5)]


def test_an_empty_subset_is_an_empty_output(server: HostileServer, tmp_path: Path) -> None:
    output = run_images(server, subset_of(["ftp://nothing"], tmp_path), tmp_path)
    conservation = output.manifest.conservation
    assert conservation is not None
    assert (conservation.rows_in, conservation.rows_out) == (0, 0)
    assert output.manifest.files == ()


@pytest.mark.slow
def test_a_shard_without_images_has_a_status_for_each_row_and_no_image_table(
    server: HostileServer, tmp_path: Path
) -> None:
    urls = [server.url("/404?x") for _ in range(3)] + [server.url(f"/scene/{index}") for index in range(2)]
    output = run_images(server, subset_of(urls, tmp_path), tmp_path, rows_per_shard=3)
    assert [entry.path for entry in output.manifest.files] == [
        "dropped.parquet",
        "images-00001.parquet",
        "status-00000.parquet",
        "status-00001.parquet",
    ]


def test_an_unreachable_host_gives_a_clear_error_and_finished_shards_are_kept(
    server: HostileServer, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    good = [server.url(f"/scene/{index}") for index in range(20)]
    subset = subset_of(good + [f"http://127.0.0.1:{port}/{index}.jpg" for index in range(30)], tmp_path)
    fetch = images_config(server).fetch.model_copy(
        update={"allowed_private_hosts": (server.host, f"127.0.0.1:{port}"), "retries": 0}
    )
    options = {"fetch": fetch, "rows_per_shard": 20, "max_failure_share": 0.9, "shards_in_flight": 1}
    with pytest.raises(ThroughlineError) as caught:
        run_images(server, subset, tmp_path, **options)
    message = str(caught.value)
    assert message.startswith("images 00000 shard 00001: 20 of 20 consecutive rows failed")
    assert f"connect_error (127.0.0.1:{port}: econnrefused), 20 times" in message
    assert "\n" not in message
    server.requests.clear()
    with pytest.raises(ThroughlineError):
        run_images(server, subset, tmp_path, **options)
    assert not server.requests  # the first shard was kept
    output = run_images(server, subset, tmp_path, **options | {"max_failure_share": 1.0})
    assert output.manifest.summary == {
        "num_rows": 50,
        "num_ok": 20,
        "statuses": {"connect_error": 30, "ok": 20},
    }


def test_failures_below_the_share_and_opt_outs_do_not_stop(server: HostileServer, tmp_path: Path) -> None:
    paths = ["/404"] * 17 + ["/noai"] * 20 + ["/jpeg"] * 3
    subset = subset_of([server.url(f"{path}?{index}") for index, path in enumerate(paths)], tmp_path)
    output = run_images(server, subset, tmp_path, rows_per_shard=40, failure_window=20, max_failure_share=0.85)
    assert output.manifest.summary["statuses"] == {"http_not_found": 17, "ok": 3, "opted_out": 20}
    with pytest.raises(ThroughlineError, match=r"17 of 20 consecutive rows failed, more than the allowed share 0\.8;"):
        run_images(server, subset, tmp_path / "strict", rows_per_shard=40, failure_window=20, max_failure_share=0.8)


@pytest.mark.slow
def test_a_killed_download_resumes_to_the_same_bytes_and_leaves_no_process(
    server: HostileServer, tmp_path: Path
) -> None:
    paths = [f"/scene/{index}" if index % 5 else "/404?x" for index in range(30)]
    paths[25:] = [f"/slow-scene/{index}" for index in range(5)]
    subset = subset_of([server.url(path) for path in paths], tmp_path)
    config = images_config(server, rows_per_shard=5, shards_in_flight=1)
    expected = images.STAGE.run(config, {"subset": [subset]}, tmp_path / "undisturbed", "00000")
    process = start_images(config, subset, tmp_path)
    try:
        journal = tmp_path / "killed" / "images" / "unfinished"
        deadline = time.monotonic() + 60
        while len(list(journal.glob("*/units/*.json"))) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finished = len(list(journal.glob("*/units/*.json")))
    assert 2 <= finished < 6
    server.requests.clear()
    resumed = images.STAGE.run(config, {"subset": [subset]}, tmp_path / "killed", "00000")
    assert resumed.data_version == expected.data_version
    assert server.requests.total() == 5 * (6 - finished)
    assert not damaged_files(resumed.folder, resumed.manifest, read_bytes=True)
    deadline = time.monotonic() + 10
    while _processes_of_session(process.pid):
        assert time.monotonic() < deadline, "decode workers outlived their killed parent"
        time.sleep(0.1)


def _processes_of_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, its_session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(its_session) == session and state != "Z":
                found.append(int(entry.name))
    return found


def rows_of(output: StageOutput) -> list[dict[str, Any]]:
    """Return the status of every row, in order."""
    return [row for path in output.files(".parquet") if path.name.startswith("status-") for row in read(path)]


def read(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def no_retries(server: HostileServer) -> FetchConfig:
    return images_config(server).fetch.model_copy(update={"retries": 0})


@pytest.mark.slow
def test_a_second_pass_retries_transient_failures_only(server: HostileServer, tmp_path: Path) -> None:
    paths = ["/heals/1/a", "/scene/1", "/heals/9/b", "/404", "/scene/2", "/heals/1/c", "/scene/3", "/scene/4", "/noai"]
    subset = subset_of([server.url(path) for path in paths], tmp_path)
    server.requests.clear()
    output = run_images(
        server, subset, tmp_path, fetch=no_retries(server), retry_passes=1, retry_pass_seconds=0.0, rows_per_shard=3
    )
    assert server.requests == Counter([*paths, "/heals/1/a", "/heals/9/b", "/heals/1/c"])
    assert [(row["status"], row["num_passes"]) for row in rows_of(output)] == [
        ("ok", 2), ("ok", 1), ("http_server_error", 2), ("http_not_found", 1), ("ok", 1), ("ok", 2), ("ok", 1),
        ("ok", 1), ("opted_out", 1),
    ]  # fmt: skip
    assert output.manifest.conservation == Conservation(
        rows_in=9, rows_out=6, dropped={"http_not_found": 1, "http_server_error": 1, "opted_out": 1}
    )
    assert output.manifest.summary["asked_again"] == {"rows": 3, "healed": 2}
    urls = [row["url"] for unit in image_units(output) for row in unit.read().to_pylist()]
    assert urls == [server.url(path) for path in paths if path not in ("/heals/9/b", "/404", "/noai")]
    assert not damaged_files(output.folder, output.manifest, read_bytes=True)
    # Without failures the images are the same, byte for byte.
    healthy = run_images(server, subset, tmp_path, fetch=no_retries(server), rows_per_shard=3)
    assert [unit.read() for unit in image_units(healthy)] == [unit.read() for unit in image_units(output)]


def test_passes_end_when_no_retryable_row_is_left(server: HostileServer, tmp_path: Path) -> None:
    subset = subset_of([server.url(path) for path in ("/scene/1", "/heals/2/d")], tmp_path)
    output = run_images(
        server, subset, tmp_path, fetch=no_retries(server), retry_passes=10, retry_pass_seconds=0.0, rows_per_shard=1
    )
    assert [(row["status"], row["num_passes"]) for row in rows_of(output)] == [("ok", 1), ("ok", 3)]


@pytest.mark.slow
def test_a_download_killed_between_passes_resumes_with_the_second(server: HostileServer, tmp_path: Path) -> None:
    paths = ["/scene/1", "/heals/1/e", "/scene/2", "/heals/1/f", "/heals/9/g", "/scene/3"]
    subset = subset_of([server.url(path) for path in paths], tmp_path)
    options = {"fetch": no_retries(server), "retry_passes": 1, "rows_per_shard": 2}
    server.requests.clear()
    expected = run_images(server, subset, tmp_path / "undisturbed", retry_pass_seconds=0.0, **options)
    server.requests.clear()
    process = start_images(images_config(server, retry_pass_seconds=60.0, **options), subset, tmp_path)
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("killed/images/unfinished/*/scratch/pass-1/status-*.parquet"))) < 3:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    assert server.requests == Counter(paths)
    resumed = run_images(server, subset, tmp_path / "killed", retry_pass_seconds=0.0, **options)
    assert server.requests == Counter([*paths, "/heals/1/e", "/heals/1/f", "/heals/9/g"])
    assert resumed.data_version == expected.data_version


def run_later(
    server: HostileServer, subset: StageOutput, earlier: StageOutput, root: Path, later_passes: int = 1, **changes: Any
) -> StageOutput:
    config = images_config(server, later_passes=later_passes, **changes)
    return images.STAGE.run(config, {"subset": [subset], "earlier": [earlier]}, root, subset.manifest.partition)


@pytest.mark.slow
def test_a_later_pass_fetches_failed_rows_only_and_copies_the_rest(server: HostileServer, tmp_path: Path) -> None:
    paths = ["/scene/1", "/scene/2", "/heals/1/h", "/scene/3", "/heals/9/i", "/404", "/no-status", "/scene/4"]
    subset = subset_of([server.url(path) for path in paths], tmp_path)
    options = {"fetch": no_retries(server), "rows_per_shard": 2}
    server.requests.clear()
    first = run_images(server, subset, tmp_path, **options)
    assert server.requests == Counter(paths)
    earlier_requests = server.requests.copy()
    second = run_later(server, subset, first, tmp_path, **options)
    assert server.requests - earlier_requests == {"/heals/1/h": 1, "/heals/9/i": 1, "/no-status": 1}
    assert second.manifest.inputs["earlier"] == (first.ref,)
    assert second.manifest.conservation == Conservation(
        rows_in=8, rows_out=5, dropped={"bad_http": 1, "http_not_found": 1, "http_server_error": 1}
    )
    assert second.manifest.summary["asked_again"] == {"rows": 3, "healed": 1}
    assert [row["num_passes"] for row in rows_of(second)] == [1, 1, 2, 1, 2, 1, 2, 1]
    files = {entry.path: entry.sha256 for entry in second.manifest.files}
    same = {entry.path for entry in first.manifest.files if files.get(entry.path) == entry.sha256}
    # In the last shard a retry failed again: its images are unchanged, its statuses count the attempt.
    assert same == {"images-00000.parquet", "status-00000.parquet", "images-00003.parquet"}
    before = {row["url"]: row for unit in image_units(first) for row in unit.read().to_pylist()}
    after = {row["url"]: row for unit in image_units(second) for row in unit.read().to_pylist()}
    assert list(after) == [server.url(path) for path in paths if path.startswith(("/scene", "/heals/1"))]
    assert {url: after[url] for url in before} == before
    third = run_later(server, subset, second, tmp_path, later_passes=2, **options)
    assert [row["num_passes"] for row in rows_of(third)] == [1, 1, 2, 1, 3, 1, 3, 1]


def test_a_later_pass_requires_the_same_rows_and_configuration(server: HostileServer, tmp_path: Path) -> None:
    subset = subset_of([server.url("/scene/1")], tmp_path)
    other = subset_of([server.url("/scene/2")], tmp_path / "other")
    first = run_images(server, subset, tmp_path)
    with pytest.raises(ThroughlineError, match="another subset or configuration"):
        run_later(server, other, first, tmp_path)
    with pytest.raises(ThroughlineError, match="another subset or configuration"):
        run_later(server, subset, first, tmp_path, later_passes=2)
    with pytest.raises(ThroughlineError, match="starts from the output of later_passes 0; give that as the input"):
        run_images(server, subset, tmp_path, later_passes=1)


@pytest.mark.slow
def test_the_order_of_completion_does_not_matter(server: HostileServer, tmp_path: Path) -> None:
    paths = [f"/slow-scene/{index}" if index % 3 == 0 else f"/scene/{index}" for index in range(20)]
    subset = subset_of([server.url(path) for path in paths], tmp_path)
    versions = {
        run_images(server, subset, tmp_path / f"{number}", **options).data_version
        for number, options in enumerate([{"shards_in_flight": 3}, {"shards_in_flight": 1, "decode_workers": 1}])
    }
    assert len(versions) == 1


class _SubsetLike(FrozenConfig):
    urls: tuple[str, ...]
    expected: tuple[str | None, ...]


def _stated_subset(run: StageRun[_SubsetLike]) -> None:
    config = run.config
    rows = [
        {"sample_key": sample_key(url, "text"), "url": url, "alt_text": "text", "expected_sha256": digest}
        for url, digest in zip(config.urls, config.expected, strict=True)
    ]
    with run.unit("rows") as unit, unit.open("rows.parquet", num_rows=len(rows)) as stream:
        pq.write_table(pa.Table.from_pylist(rows), stream)


@pytest.mark.slow
def test_drifted_images_are_recorded_and_kept_or_dropped(server: HostileServer, tmp_path: Path) -> None:
    urls = tuple(server.url(f"/scene/{index}") for index in range(3))
    plain = run_images(server, subset_of(list(urls), tmp_path / "plain"), tmp_path / "plain")
    digests = {row["url"]: row["source_sha256"] for unit in image_units(plain) for row in unit.read().to_pylist()}
    assert {row["drifted"] for unit in image_units(plain) for row in unit.read().to_pylist()} == {None}
    stage = plain_stage(name="subset", code_version="1", config_type=_SubsetLike, produce=_stated_subset)
    stated = (digests[urls[0]].upper(), "0" * 64, None)
    subset = stage.run(_SubsetLike(urls=urls, expected=stated), {}, tmp_path, "00000")
    kept = run_images(server, subset, tmp_path)
    rows = [row for unit in image_units(kept) for row in unit.read().to_pylist()]
    assert {row["url"]: row["drifted"] for row in rows} == dict(zip(urls, (False, True, None), strict=True))
    assert kept.manifest.summary["drift"] == {"drifted": 1, "same": 1}
    statuses = pq.read_table(kept.path("status-00000.parquet")).to_pylist()
    assert statuses[1]["status"] == "ok" and "the source table states 0000000000000000" in statuses[1]["detail"]
    strict = run_images(server, subset, tmp_path, drift="drop")
    assert strict.manifest.conservation == Conservation(rows_in=3, rows_out=2, dropped={"drifted": 1})
    (lost,) = pq.read_table(strict.path("dropped.parquet")).to_pylist()
    assert (lost["sample_key"], lost["reason"]) == (sample_key(urls[1], "text"), "drifted")


def test_drift_is_counted_over_all_passes(server: HostileServer, tmp_path: Path) -> None:
    urls = (server.url("/jpeg"), server.url("/heals/1/drift"), server.url("/heals/1/same"))
    stage = plain_stage(name="subset", code_version="1", config_type=_SubsetLike, produce=_stated_subset)
    expected = ("0" * 64, "0" * 64, hashlib.sha256(JPEG).hexdigest())
    subset = stage.run(_SubsetLike(urls=urls, expected=expected), {}, tmp_path, "00000")
    server.requests.clear()
    passes = {"fetch": no_retries(server), "retry_passes": 1, "retry_pass_seconds": 0.0}
    output = run_images(server, subset, tmp_path, **passes)
    assert output.manifest.summary["drift"] == {"drifted": 2, "same": 1}
    server.requests.clear()
    strict = run_images(server, subset, tmp_path, drift="drop", **passes)
    assert strict.manifest.summary["drift"] == {"drifted": 2, "same": 1}


def test_settings_that_decide_which_rows_succeed_are_part_of_the_fingerprint() -> None:
    def fingerprint(config: ImagesConfig) -> str:
        return images.STAGE.fingerprint(config, {})

    assert fingerprint(ImagesConfig(decode_workers=7, max_failure_share=0.5)) == fingerprint(ImagesConfig())
    for fetch in (FetchConfig(total_seconds=1), FetchConfig(opt_out_directives=()), FetchConfig(retries=0)):
        assert fingerprint(ImagesConfig(fetch=fetch)) != fingerprint(ImagesConfig())


def test_a_redirect_to_an_opted_out_domain_drops_the_row(server: HostileServer, tmp_path: Path) -> None:
    urls = [server.url("/redirect-opted-out-domain"), server.url("/redirect-denied-domain"), server.url("/redirect")]
    lists = {
        "opt_outs": entry_list(tmp_path / "opt-outs.txt", "artist.example"),
        "domains_denied": entry_list(tmp_path / "domains.txt", "denied.example"),
    }
    fetch = no_retries(server).model_copy(update=lists)
    output = run_images(server, subset_of(urls, tmp_path), tmp_path, fetch=fetch)
    assert output.manifest.summary["statuses"] == {"domain_denied": 1, "ok": 1, "opted_out": 1}
    dropped = pq.read_table(output.path("dropped.parquet")).to_pylist()
    assert {row["reason"]: row["detail"] for row in dropped} == {
        "opted_out": "http://cdn.artist.example/x.jpg",
        "domain_denied": "http://img.denied.example:81/x.jpg",
    }


def test_without_lists_existing_downloads_are_still_found(tmp_path: Path) -> None:
    fetch = identity_of(FetchConfig())
    assert not {"opt_outs", "urls_denied", "domains_denied"} & fetch.keys()
    listed = entry_list(tmp_path / "list.txt", "artist.example")
    assert identity_of(FetchConfig(opt_outs=listed)) == fetch | {"opt_outs": {"sha256": listed.sha256}}


def test_progress_shows_failures_by_reason(
    server: HostileServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    subset = subset_of([server.url("/404?x"), server.url("/jpeg")], tmp_path)
    capfd.readouterr()
    monkeypatch.setenv("THROUGHLINE_PROGRESS_JSON", "1")
    run_images(server, subset, tmp_path)
    last = json.loads(capfd.readouterr().err.splitlines()[-1])["progress"]
    assert (last["done"], last["total"]) == (2, 2)
    assert re.fullmatch(r"\d+/s \d+\.\d MB/s", last["details"].pop("now"))
    assert last["details"] == {"ok": 1, "failed": "1 (http_not_found 1)"}
