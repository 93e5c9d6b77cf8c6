"""Let a CUDA build of torchvision be imported beside a CPU build of torch; installed as a ``.pth`` by `make setup`.

Where PyTorch's CPU wheel index cannot be reached, the ordinary registry's torchvision is built for CUDA. Its Python
code registers fake implementations for two operators (``nms``, ``qnms``) which its compiled library would have
defined, so the import fails with "operator torchvision::nms does not exist". Defining the two schemas first is enough:
image transforms, all that processors and vLLM use on a CPU, are plain Python. vLLM starts fresh processes, hence the
``.pth``: it runs in each of them. A torchvision whose library loads is left alone.

Run as a script to install itself: ``python requirements/torchvision_shim.py``.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

MODULE_NAME = "throughline_torchvision_shim"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_keep_alive: list[object] = []


def compiled_library_loads() -> bool:
    """Whether torchvision's own operators can be loaded beside the installed torch."""
    import torch

    spec = importlib.machinery.PathFinder.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return False
    for folder in spec.submodule_search_locations:
        for library in Path(folder).glob("_C*.so"):
            try:
                torch.ops.load_library(str(library))
            except OSError:
                return False
            return True
    return False


def define_missing_operators() -> None:
    """Define the schemas of torchvision's operators where its library cannot."""
    import torch

    if compiled_library_loads():
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _keep_alive.append(library)


class _Finder(importlib.abc.MetaPathFinder):
    """Runs once, just before the first import of torchvision, and then steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            if importlib.util.find_spec("torch") is not None:
                define_missing_operators()
        return None


def register() -> None:
    """Arrange for the check to happen when torchvision is first imported; costs nothing until then."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def install(site_packages: Path) -> None:
    """Copy this module into `site_packages`, with the ``.pth`` line that registers it in every process."""
    (site_packages / f"{MODULE_NAME}.py").write_text(Path(__file__).read_text())
    (site_packages / f"{MODULE_NAME}.pth").write_text(f"import {MODULE_NAME}; {MODULE_NAME}.register()\n")


if __name__ == "__main__":
    import sysconfig

    install(Path(sysconfig.get_paths()["purelib"]))
