"""Publication: a finished work folder becomes the immutable output of its data version, even if others race for it."""

import errno
import shutil
from contextlib import suppress
from pathlib import Path

from pipelines.core.atomic import sync_folder, write_bytes
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import MANIFEST_NAME, Manifest, damaged_files, read_manifest

OUT = "out"
"""Folder within a work folder whose files are published."""
_REPLACED = "replaced"
_ATTEMPTS = 100


def publish(manifest: Manifest, work_folder: Path, stage_root: Path) -> Manifest:
    """Make the files of `work_folder` the output of the manifest's data version; return the published manifest.

    If an intact output of that data version exists, it is kept and the work folder removed: another process published
    the same content first, or its pointer was lost. So no file vanishes for its readers. A damaged output is replaced.
    """
    out_folder, folder = work_folder / OUT, stage_root / manifest.data_version
    _remove_strays(out_folder, manifest)
    manifest.write(out_folder)
    pointers = stage_root / "fingerprints"
    pointers.mkdir(exist_ok=True)
    # The pointer comes before the folder: a kill in between leaves a dangling pointer, which counts as unfinished, and
    # all files are still in the work folder. In the reverse order they would be in neither place.
    write_bytes(pointers / manifest.fingerprint, manifest.data_version.encode())
    published = _put_in_place(manifest, out_folder, folder, work_folder / _REPLACED)
    shutil.rmtree(work_folder)
    return published


def _put_in_place(manifest: Manifest, out_folder: Path, folder: Path, replaced: Path) -> Manifest:
    for _ in range(_ATTEMPTS):
        try:
            out_folder.rename(folder)  # succeeds if `folder` is missing or empty
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        else:
            sync_folder(folder.parent)
            return manifest
        existing = _intact(folder)
        if existing is not None:
            return existing
        shutil.rmtree(replaced, ignore_errors=True)
        with suppress(FileNotFoundError):
            folder.rename(replaced)
    raise ThroughlineError(f"{folder}: other processes keep replacing it; stop them and run again")


def _intact(folder: Path) -> Manifest | None:
    try:
        manifest = read_manifest(folder / MANIFEST_NAME)
    except ThroughlineError:
        return None
    if manifest.data_version != folder.name or damaged_files(folder, manifest, read_bytes=True):
        return None
    return manifest


def _remove_strays(out_folder: Path, manifest: Manifest) -> None:
    listed = {entry.path for entry in manifest.files}
    for path in out_folder.rglob("*"):
        name = path.relative_to(out_folder).as_posix()
        if path.is_file() and name not in listed and name != MANIFEST_NAME:
            path.unlink()  # left by a unit that was killed before its journal entry
