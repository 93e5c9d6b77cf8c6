"""Downloads files in this process, or in a new one where this process was forked from one that used obstore."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.storage.clients import is_forked
from pipelines.storage.config import StoreConfig
from pipelines.storage.object_store import ObjectFile, ObjectStore
from pipelines.storage.store_errors import StorageError

_FAILED = 3


def download_files(store: ObjectStore, files: Sequence[ObjectFile], on_done: Callable[[], None]) -> None:
    """Download files in parallel, calling `on_done` after each; raises StorageError."""
    if is_forked():
        _download_in_new_process(store.config, files, on_done)
    else:
        store.download_all(files, on_done)


def _download_in_new_process(config: StoreConfig, files: Sequence[ObjectFile], on_done: Callable[[], None]) -> None:
    work = {
        "config": config.model_dump(mode="json"),
        "files": [[file.key, str(file.path.absolute()), file.sha256, file.num_bytes] for file in files],
    }
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        text=True,
    )
    with process:
        try:
            assert process.stdin is not None and process.stdout is not None and process.stderr is not None
            json.dump(work, process.stdin)
            process.stdin.close()
            for _ in process.stdout:
                on_done()
            message = process.stderr.read().strip()
        except BaseException:
            process.kill()
            raise
    if process.returncode == _FAILED:
        raise StorageError(message)
    if process.returncode:
        last = message.rpartition("\n")[2] or "no message"
        raise StorageError(f"{config.url}: the process that downloads ended with code {process.returncode} ({last})")


def main() -> int:
    """Read work as JSON from the standard input; print a line for each finished file."""
    work = json.load(sys.stdin)
    files = [ObjectFile(key, Path(path), sha256, num_bytes) for key, path, sha256, num_bytes in work["files"]]
    store = ObjectStore(StoreConfig.model_validate(work["config"]))
    try:
        store.download_all(files, lambda: print(flush=True))
    except StorageError as error:
        print(error, file=sys.stderr)
        return _FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
