import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.cli import status
from orchestration.cli.main import COMMANDS, main
from orchestration.cli.ui import check_port
from pipelines.core.errors import ThroughlineError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THROUGHLINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home" / "dagster"))


def _main(*arguments: str) -> object:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_help_loads_nothing_but_the_standard_library() -> None:
    code = (
        "import sys\nfrom orchestration.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('dagster', 'pydantic', 'numpy', 'pyarrow', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_has_help_that_loads_no_heavy_library() -> None:
    light = [name for name in COMMANDS if name not in ("run", "ui")]
    code = (
        "import sys\nfrom orchestration.cli.main import main\n"
        f"for name in {light}:\n"
        "    try:\n        main([name, '--help'])\n    except SystemExit as end:\n        assert not end.code\n"
        "print([name for name in ('dagster', 'numpy', 'pyarrow', 'rich', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.count("usage: throughline") == len(light)


def test_profile_show_prints_lines_that_set_accepts(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("profile", "show", "paper") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "training.steps = 500000" in lines
    assert 'captions.captioner.model.id = "Qwen/Qwen3-VL-32B-Instruct"' in lines
    assert _main("profile", "show", "paper", "--set", "training.steps=5", "--json") == 0
    assert json.loads(capsys.readouterr().out)["training"]["steps"] == 5


@pytest.mark.slow
def test_params_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("params", "--profile", "paper", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert {name: row["parameters"] for name, row in figures["strategies"].items()} == {
        "penultimate": 2_246_693_952, "uniform": 2_246_693_952, "static": 2_246_693_988, "fuse_dit": 1_711_646_784,
        "time_wise": 2_246_778_468, "depth_wise": 2_246_694_816, "joint": 2_248_722_336,
    }  # fmt: skip
    depth_wise = figures["strategies"]["depth_wise"]["flops"]
    assert {size: round(row["uncached"] / 1e12, 1) for size, row in depth_wise.items()} == {"256": 144.9, "512": 469.6}
    assert _main("params", "--profile", "paper", "--set", "model.timestep_conditioning=adaln") == 0
    text = capsys.readouterr().out
    assert "of these adaLN" in text and "2,246,694,816" not in text


@pytest.mark.slow
def test_a_missing_source_is_one_sentence_and_status_one(tmp_path: Path) -> None:
    message = _main("run", "--profile", "single_gpu", "--set", f'source=["{tmp_path}/no"]', "--select", "laion_index")
    assert message == (
        f"error: laion_index can't start: {tmp_path}/no: no such file or folder; "
        "name LAION metadata as a folder, glob or parquet file"
    )


@pytest.mark.slow
def test_an_empty_source_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = _main("run", "--profile", "single_gpu", "--set", f'source=["{tmp_path}/empty"]')
    assert isinstance(message, str) and "the folder is empty" in message and "\n" not in message


def test_an_unknown_asset_is_one_sentence() -> None:
    message = _main("run", "--profile", "single_gpu", "--select", "imagez")
    assert isinstance(message, str) and message.startswith("error: no asset 'imagez' in the graph; it has: laion_index")


@pytest.mark.parametrize("selection", ["", " , "])
def test_an_empty_selection_is_refused_not_taken_for_the_whole_graph(selection: str) -> None:
    message = _main("run", "--profile", "single_gpu", "--select", selection)
    assert message == (
        f"error: selection {selection!r}: expected names of assets, found none; name some, such as images or "
        "group:training, or leave the selection out to take all"
    )


@pytest.mark.parametrize("command", ["run", "status", "ui"])
@pytest.mark.parametrize("below", ["", "/below"])
def test_a_file_as_output_root_is_one_sentence(command: str, below: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    found = f"the file {file} in its path" if below else "a file"
    message = _main(command, "--profile", "single_gpu", "--output-root", f"{file}{below}")
    assert message == (
        f"error: output root {file}{below}: expected a folder, found {found}; name another with: "
        "--output-root /a/folder"
    )


@pytest.mark.parametrize("words", [["run"], ["estimate", "--calibrate"], ["status"]])
def test_a_home_that_is_a_file_is_one_sentence(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    monkeypatch.setenv("THROUGHLINE_HOME", str(file))
    assert _main(*words, "--profile", "single_gpu") == (
        f"error: THROUGHLINE_HOME {file}: expected a folder, found a file; name another with: "
        "export THROUGHLINE_HOME=/a/folder"
    )


def test_an_os_error_about_a_file_is_one_sentence_and_a_bug_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a folder")
    message = _main("run", "--profile", "single_gpu")
    assert message == (
        f"error: {tmp_path}/file: already exists and is not what was expected; fix that and run the same "
        "command again: finished outputs are reused"
    )

    def broken(arguments: object) -> int:
        raise OSError("of no file")

    monkeypatch.setattr(status, "run_status", broken)
    with pytest.raises(OSError, match="of no file"):
        main(["status"])


def test_an_empty_output_root_is_refused() -> None:
    message = _main("run", "--output-root", "")
    assert isinstance(message, str) and message.startswith(
        "error: --output-root '': expected a folder or s3://bucket/prefix"
    )


@pytest.mark.parametrize("port", ["99999", "0", "-1"])
def test_an_invalid_port_is_one_sentence(port: str) -> None:
    message = _main("ui", "--profile", "single_gpu", "--port", port)
    assert message == f"error: --port {port}: expected 1 to 65535; omit it for the default"


def test_status_of_an_empty_root_lists_everything_as_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("status", "--profile", "single_gpu") == 0
    assert "laion_index" in capsys.readouterr().out
    assert _main("status", "--profile", "single_gpu", "--json") == 0
    records = json.loads(capsys.readouterr().out)
    assert {record["state"] for record in records} == {"missing"}


def test_audit_of_an_empty_root_is_refused() -> None:
    message = _main("audit", "--profile", "single_gpu")
    assert isinstance(message, str) and "is not finished; run `throughline run` first" in message


def test_a_taken_port_is_one_sentence() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ThroughlineError, match=f"port {port} on 127.0.0.1 is taken"):
            check_port(port)
    check_port(port)
