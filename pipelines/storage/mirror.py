"""Output roots mirrored in an object store: finished outputs are published there and fetched on demand.

A ``store.json`` in a local output root makes it the working folder of a store's prefix. Stages run as in any folder;
their finished outputs are uploaded under the same names: files first, then the fingerprint's pointer, then the
manifest. So an output exists in the store exactly when its manifest does. Lookups check the folder, then the store; a
file is fetched when it is needed, and verified against the manifest. The folder is a cache: while nothing runs, any
finished output in it may be deleted.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from pipelines.core.atomic import exclusive, write_bytes, write_json
from pipelines.core.digest import digest_json, file_sha256
from pipelines.core.errors import ThroughlineError, problem_in_words
from pipelines.core.manifest import MANIFEST_NAME, FileEntry, Manifest, parse_manifest, read_manifest
from pipelines.core.progress import Progress
from pipelines.storage.config import StoreConfig
from pipelines.storage.downloads import download_files
from pipelines.storage.object_store import ObjectFile, ObjectStore

STORE_NAME = "store.json"
POINTERS = "fingerprints"
_STORED = "stored"
_LOCKS = "unfinished"
_QUIET_BYTES = 32 << 20
"""Smaller transfers show no progress."""


def working_folder(home: Path, config: StoreConfig) -> Path:
    """Return the working folder of a store under `home`, one for each URL."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", config.path)[-60:]
    return home / "stores" / f"{readable}-{digest_json(config.url)[:8]}"


def open_root(location: str, home: Path) -> Path:
    """Return an output root given as a folder, or the working folder under `home` of one given as a store's URL.

    Raises ThroughlineError for a URL of another kind.
    """
    if "://" not in location:
        return Path(location)
    try:
        config = StoreConfig(url=location)
    except ValidationError as error:
        raise ThroughlineError(problem_in_words(error.errors()[0])) from error
    root = working_folder(home, config)
    bind(root, config)
    return root


def bind(root: Path, config: StoreConfig) -> "OutputStore":
    """Make `root` the working folder of an object store; repeated, it only updates the transfer settings.

    Raises ThroughlineError where the folder holds outputs of its own or belongs to another store.
    """
    path = root / STORE_NAME
    bound = _bound_to(path)
    if bound is not None and bound.url != config.url:
        raise ThroughlineError(f"{root}: is the working folder of {bound.url}, not of {config.url}; choose another")
    if bound is None and root.is_dir() and any(root.glob(f"*/*/{MANIFEST_NAME}")):
        raise ThroughlineError(f"{root}: holds outputs of its own, so it can't become the folder of {config.url}")
    if bound != config:
        root.mkdir(parents=True, exist_ok=True)
        write_json(path, config.model_dump(mode="json"))
    return _open(root, config)


def store_of(root: Path) -> "OutputStore | None":
    """Return the store of which an output root is the working folder, or None for a plain folder."""
    config = _bound_to(root / STORE_NAME)
    return None if config is None else _open(root, config)


def sync_manifests(root: Path, stage: str, version_prefix: str = "") -> None:
    """Fetch the manifests of a stage's outputs into a mirrored root, so that the folder lists them all.

    `version_prefix` limits this to data versions that start with it.
    """
    store = store_of(root)
    if store is not None:
        store.fetch_manifests(stage, version_prefix)


def location_of(root: Path) -> str:
    """Return an output root's location for messages: the folder, or the store's URL with its working folder."""
    config = _bound_to(root / STORE_NAME)
    return str(root) if config is None else f"{config.url} (working folder {root})"


def _bound_to(path: Path) -> StoreConfig | None:
    try:
        return StoreConfig.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        raise ThroughlineError(f"{path}: not a description of an object store; delete it and run again") from error


@lru_cache(maxsize=64)
def _open(root: Path, config: StoreConfig) -> "OutputStore":
    return OutputStore(root, config)


class OutputStore:
    """The outputs of one root in its object store, with their copies in the working folder."""

    def __init__(self, root: Path, config: StoreConfig) -> None:
        self.root = root
        self.config = config
        self.objects = ObjectStore(config)
        self.absence_seconds = 0.0
        """How long a missing output is remembered as missing; a plan looks the same ones up many times."""
        self._absent_until: dict[tuple[str, str], float] = {}

    def check(self) -> None:
        """Raise StorageError, with the next step, where the store can't be used."""
        self.objects.check()

    def find(self, stage: str, fingerprint: str) -> Path | None:
        """Return the folder of a fingerprint's output, with its manifest, if the output is finished in the store.

        No request is sent for outputs that this folder has recorded as stored.
        """
        pointer = self.root / stage / POINTERS / fingerprint
        version = pointer.read_text().strip() if pointer.is_file() else None
        if version and self._is_stored(stage, version) and self._has_manifest(stage, version):
            return self.root / stage / version
        if time.monotonic() < self._absent_until.get((stage, fingerprint), 0.0):
            return None
        version = (self.objects.read(f"{stage}/{POINTERS}/{fingerprint}") or b"").decode().strip()
        if not version or not self.fetch_manifest(stage, version):
            self._absent_until[stage, fingerprint] = time.monotonic() + self.absence_seconds
            return None
        pointer.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(pointer, version.encode())
        return self.root / stage / version

    def fetch_manifest(self, stage: str, version: str) -> bool:
        """Fetch an output's manifest into the folder; return False where the store has no valid one."""
        if self._is_stored(stage, version) and self._has_manifest(stage, version):
            return True
        data = self.objects.read(f"{stage}/{version}/{MANIFEST_NAME}")
        if data is None or _manifest_problem(data, version, "") is not None:
            return False
        folder = self.root / stage / version
        if not self._has_manifest(stage, version):
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / MANIFEST_NAME, data)
        self._mark_stored(stage, version)
        return True

    def fetch_manifests(self, stage: str, version_prefix: str = "") -> None:
        """Fetch a stage's manifests into the folder, limited to data versions that start with `version_prefix`."""
        versions = self.objects.folders(f"{stage}/{version_prefix}")
        missing = [name for name in versions if name != POINTERS and not self._has_manifest(stage, name)]
        with ThreadPoolExecutor(self.config.transfer.threads) as pool:
            list(pool.map(lambda version: self.fetch_manifest(stage, version), missing))

    def stages(self) -> list[str]:
        """Return the names of the stages with objects in the store."""
        return self.objects.folders("")

    def fetch(
        self, folder: Path, manifest: Manifest, names: Iterable[str] | None = None, *, alone: bool = False
    ) -> None:
        """Fetch files of an output that are missing or truncated in its folder; None means all.

        Companions, which share a file's name up to the first dot, such as a shard's index, are fetched too unless
        `alone`. Raises StorageError where a file is missing in the store or differs from the manifest.
        """
        named = names if names is None else list(names)
        if not self._missing(folder, manifest, named, alone):
            return
        with exclusive(self._lock(folder)):
            files = [self._object(folder, manifest, entry) for entry in self._missing(folder, manifest, named, alone)]
            with _progress("fetch", manifest, files) as count:
                download_files(self.objects, files, count)

    def cached(self, folder: Path, manifest: Manifest) -> Manifest:
        """Return the manifest reduced to the files present in the folder."""
        files = tuple(entry for entry in manifest.files if (folder / entry.path).is_file())
        return manifest.model_copy(update={"files": files})

    def delete_damaged_copies(self, folder: Path, manifest: Manifest) -> None:
        """Delete local copies that differ from the manifest; they are fetched again when needed."""
        for entry in self.cached(folder, manifest).files:
            if file_sha256(folder / entry.path) != entry.sha256:
                (folder / entry.path).unlink()

    def publish(self, folder: Path, manifest: Manifest, *, read_bytes: bool = False) -> bool:
        """Upload a finished output: its files, the pointer of its fingerprint, and last its manifest.

        Return False where another machine published different bytes for the same fingerprint first: that output wins,
        as if it had been found before the stage ran. Files that the store already holds are skipped: by size and noted
        digest, or with `read_bytes` by every byte. An interrupted call can be repeated; no reader finds the output
        until it returns.
        """
        stage, version = manifest.stage, manifest.data_version
        files = [self._object(folder, manifest, entry) for entry in manifest.files]
        with ThreadPoolExecutor(self.config.transfer.threads) as pool:
            held = list(pool.map(lambda file: self.objects.holds(file, read_bytes=read_bytes), files))
        missing = [file for file, is_held in zip(files, held, strict=True) if not is_held]
        with _progress("store", manifest, missing, len(files) - len(missing)) as count:
            self.objects.upload(missing, lambda file: count())
        if not self._point_at(manifest):
            return False
        self._write_manifest(folder, manifest)
        self._mark_stored(stage, version)
        return True

    def damaged(self, manifest: Manifest) -> list[str]:
        """Return one sentence for each object of an output that is missing or differs from its manifest.

        Reads every byte from the store and keeps none.
        """
        stage, version = manifest.stage, manifest.data_version
        key = f"{stage}/{version}/{MANIFEST_NAME}"
        data = self.objects.read(key)
        problem = (
            f"{self.objects.url(key)}: missing; re-run {stage}"
            if data is None
            else _manifest_problem(data, version, self.objects.url(key))
        )
        with ThreadPoolExecutor(self.config.transfer.threads) as pool:
            problems = list(pool.map(lambda entry: self._object_problem(manifest, entry), manifest.files))
        return [text for text in (problem, *problems) if text is not None]

    def _object_problem(self, manifest: Manifest, entry: FileEntry) -> str | None:
        key = f"{manifest.stage}/{manifest.data_version}/{entry.path}"
        stage = f"{manifest.stage} {manifest.partition or ''}".rstrip()
        content = self.objects.digest(key)
        if content is None:
            return f"{self.objects.url(key)}: missing; re-run {stage}"
        sha256, num_bytes = content
        if num_bytes != entry.num_bytes:
            return f"{self.objects.url(key)}: {num_bytes} bytes, manifest says {entry.num_bytes}; re-run {stage}"
        if sha256 != entry.sha256:
            return (
                f"{self.objects.url(key)}: SHA-256 {sha256[:12]}..., manifest says {entry.sha256[:12]}...; "
                f"re-run {stage}"
            )
        return None

    def _point_at(self, manifest: Manifest) -> bool:
        """Point the fingerprint at this output, unless it points at another finished one; return whether it does."""
        stage, version = manifest.stage, manifest.data_version
        key = f"{stage}/{POINTERS}/{manifest.fingerprint}"
        stored = self.objects.read(key)
        if stored is None:
            if self.objects.write_new(key, version.encode()):
                return True
            stored = self.objects.read(key)
        other = (stored or b"").decode().strip()
        if other and other != version:
            data = self.objects.read(f"{stage}/{other}/{MANIFEST_NAME}")
            if data is not None and _manifest_problem(data, other, "") is None:
                return False
        if other != version:
            self.objects.write(key, version.encode())
        return True

    def _write_manifest(self, folder: Path, manifest: Manifest) -> None:
        key = f"{manifest.stage}/{manifest.data_version}/{MANIFEST_NAME}"
        data = (folder / MANIFEST_NAME).read_bytes()
        if self.objects.write_new(key, data):
            return
        # Another machine published the same content first: its manifest stays, unless it is damaged.
        stored = self.objects.read(key)
        if stored is None or _manifest_problem(stored, manifest.data_version, "") is not None:
            self.objects.write(key, data)

    def _missing(self, folder: Path, manifest: Manifest, names: Sequence[str] | None, alone: bool) -> list[FileEntry]:
        if names is None:
            entries: Sequence[FileEntry] = manifest.files
        elif alone:
            entries = [entry for entry in manifest.files if entry.path in names]
        else:
            entries = _with_companions(manifest.files, names)
        return [entry for entry in entries if not _has_size(folder / entry.path, entry.num_bytes)]

    def _object(self, folder: Path, manifest: Manifest, entry: FileEntry) -> ObjectFile:
        key = f"{manifest.stage}/{manifest.data_version}/{entry.path}"
        return ObjectFile(key, folder / entry.path, entry.sha256, entry.num_bytes)

    def _lock(self, folder: Path) -> Path:
        path = folder.parent / _LOCKS / f"{folder.name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _has_manifest(self, stage: str, version: str) -> bool:
        try:
            return read_manifest(self.root / stage / version / MANIFEST_NAME).data_version == version
        except ThroughlineError:
            return False

    def _is_stored(self, stage: str, version: str) -> bool:
        return (self.root / stage / _STORED / version).exists()

    def _mark_stored(self, stage: str, version: str) -> None:
        path = self.root / stage / _STORED / version
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _with_companions(files: Sequence[FileEntry], names: Iterable[str]) -> list[FileEntry]:
    stems = {_stem(name) for name in names}
    return [entry for entry in files if _stem(entry.path) in stems]


def _stem(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _has_size(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except FileNotFoundError:
        return False


def _manifest_problem(data: bytes, version: str, name: str) -> str | None:
    """Return one sentence about an invalid manifest; None where the bytes are the data version's manifest."""
    try:
        manifest = parse_manifest(data, name)
    except ThroughlineError as error:
        return str(error)
    if manifest.data_version != version:
        return f"{name}: is the manifest of data version {manifest.data_version}"
    return None


@contextmanager
def _progress(
    label: str, manifest: Manifest, files: Sequence[ObjectFile], held: int = 0
) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each file; large transfers show progress."""
    if sum(file.num_bytes for file in files) < _QUIET_BYTES:
        yield lambda: None
        return
    label = f"{label} {manifest.stage} {manifest.partition or ''}".rstrip()
    with Progress(label, held + len(files), "files", initial=held) as bar:
        yield bar.advance
