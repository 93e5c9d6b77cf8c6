"""The shim lets a torchvision that cannot load its library be imported, in every process, and leaves others alone."""

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SHIM = Path(__file__).resolve().parents[2] / "requirements" / "torchvision_shim.py"

FAKE_TORCHVISION = textwrap.dedent(
    """
    import torch

    @torch.library.register_fake("torchvision::nms")
    def _nms(dets, scores, iou_threshold):
        return dets
    """
)


def _run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with `folder` first on the path and without ``.pth`` files: this environment's own shim stays out."""
    path = [str(folder), *(entry for entry in sys.path if entry)]
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {path!r}; {code}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _install(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("shim", SHIM)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install(folder)


def _write_fake_torchvision(folder: Path, library: bytes | None) -> None:
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(FAKE_TORCHVISION)
    if library is not None:
        (package / "_C.so").write_bytes(library)


@pytest.mark.slow
def test_unloadable_library_gets_its_schemas_defined(tmp_path: Path) -> None:
    _write_fake_torchvision(tmp_path, b"not a library")
    _install(tmp_path)
    without = _run(tmp_path, "import torchvision")
    assert "does not exist" in without.stderr
    done = _run(
        tmp_path,
        "import throughline_torchvision_shim as s; s.register(); s.register(); import torchvision, torch; "
        "print(torch.ops.torchvision.nms)",
    )
    assert done.returncode == 0, done.stderr
    assert "torchvision.nms" in done.stdout


def test_pth_line_registers_the_shim(tmp_path: Path) -> None:
    _install(tmp_path)
    done = _run(
        tmp_path,
        "import site; site.addsitedir(sys.path[0]); print(type(sys.meta_path[0]).__module__)",
    )
    assert done.stdout.strip() == "throughline_torchvision_shim", done.stderr


def test_shim_costs_no_torch_import_until_torchvision_is_imported(tmp_path: Path) -> None:
    _install(tmp_path)
    done = _run(tmp_path, "import throughline_torchvision_shim as s; s.register(); print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.slow
def test_environment_imports_torchvision() -> None:
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
