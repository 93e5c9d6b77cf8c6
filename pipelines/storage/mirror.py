"""Output roots that are mirrored in an object store: what is published there, and what is fetched from there.

A local output root may say in its ``store.json`` that it is the working folder of an S3 prefix. Stages then run as
they always do; what they finish is uploaded under the same names, files first, the fingerprint's pointer next and the
manifest last, so an output exists in the store exactly when its manifest does. Whoever looks for an output looks in
the folder and then in the store, and a file is fetched, and checked against its manifest, when somebody asks for it.
The folder is a cache: any finished output in it may be deleted while nothing runs.
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
from pipelines.storage.s3 import SCHEME, ObjectFile, ObjectStore, StoreConfig

STORE_NAME = "store.json"
POINTERS = "fingerprints"
_STORED = "stored"
_LOCKS = "unfinished"
_QUIET_BYTES = 32 << 20
"""Less than this is moved without a word."""


def working_folder(home: Path, config: StoreConfig) -> Path:
    """Return the folder under `home` for the outputs of a store; every URL has its own."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", config.url.removeprefix(SCHEME))[-60:]
    return home / "stores" / f"{readable}-{digest_json(config.url)[:8]}"


def open_root(location: str, home: Path) -> Path:
    """Return the folder of an output root named as a folder, or as a URL whose working folder is under `home`.

    Raises ThroughlineError where the URL is none of an object store.
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
    """Make `root` the working folder of an object store; done again, it changes how objects travel and nothing else.

    Raises ThroughlineError where the folder holds outputs of its own, or those of another store.
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
    """Return the store that an output root is the working folder of, or None for a root that is a folder alone."""
    config = _bound_to(root / STORE_NAME)
    return None if config is None else _open(root, config)


def know_outputs(root: Path, stage: str, version_prefix: str = "") -> None:
    """Bring the manifests of a stage's outputs into a root that is mirrored in an object store, so that a look at the
    folder finds them all; `version_prefix` names those alone whose data versions start so."""
    store = store_of(root)
    if store is not None:
        store.fetch_manifests(stage, version_prefix)


def location_of(root: Path) -> str:
    """Return how an output root is named to people."""
    config = _bound_to(root / STORE_NAME)
    return str(root) if config is None else f"{config.url} (working folder {root})"


def _bound_to(path: Path) -> StoreConfig | None:
    try:
        return StoreConfig.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        raise ThroughlineError(f"{path}: not the description of an object store; delete it and run again") from error


@lru_cache(maxsize=64)
def _open(root: Path, config: StoreConfig) -> "OutputStore":
    return OutputStore(root, config)


class OutputStore:
    """The outputs of one root in its object store, and their copies in the working folder."""

    def __init__(self, root: Path, config: StoreConfig) -> None:
        self.root = root
        self.config = config
        self.objects = ObjectStore(config)
        self.absence_seconds = 0.0
        """How long an answer that there is no output is relied upon; the plan asks for the same ones over and over."""
        self._absent_until: dict[tuple[str, str], float] = {}
        self._swept: set[str] = set()

    def check(self) -> None:
        """Raise StorageError, with what to do, where the store can't be used."""
        self.objects.check()

    def find(self, stage: str, fingerprint: str) -> Path | None:
        """Return the folder of the output of a fingerprint if it is finished in the store; its manifest is there then.

        What this folder knows to be stored is not asked for again.
        """
        pointer = self.root / stage / POINTERS / fingerprint
        version = pointer.read_text().strip() if pointer.is_file() else None
        if version and self._is_stored(stage, version) and self._has_manifest(stage, version):
            return self.root / stage / version
        if time.monotonic() < self._absent_until.get((stage, fingerprint), 0.0):
            return None
        stated = self.objects.read(f"{stage}/{POINTERS}/{fingerprint}")
        if stated is None or not self.fetch_manifest(stage, stated.decode().strip()):
            self._absent_until[stage, fingerprint] = time.monotonic() + self.absence_seconds
            return None
        version = stated.decode().strip()
        pointer.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(pointer, version.encode())
        return self.root / stage / version

    def fetch_manifest(self, stage: str, version: str) -> bool:
        """Bring an output's manifest into the folder; return False where the store has none that is sound."""
        if self._is_stored(stage, version) and self._has_manifest(stage, version):
            return True
        data = self.objects.read(f"{stage}/{version}/{MANIFEST_NAME}")
        if data is None or _manifest_problem(data, version, "") is not None:
            return False
        folder = self.root / stage / version
        if not self._has_manifest(stage, version):
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / MANIFEST_NAME, data)
        self._note_stored(stage, version)
        return True

    def fetch_manifests(self, stage: str, version_prefix: str = "") -> None:
        """Bring the manifests of all outputs of a stage, or of those whose data version starts so, into the folder."""
        versions = self.objects.folders(f"{stage}/{version_prefix}")
        missing = [name for name in versions if name != POINTERS and not self._has_manifest(stage, name)]
        with ThreadPoolExecutor(self.config.transfer.threads) as pool:
            list(pool.map(lambda version: self.fetch_manifest(stage, version), missing))

    def stages(self) -> list[str]:
        """Return the stages that have anything in the store."""
        return self.objects.folders("")

    def fetch(
        self, folder: Path, manifest: Manifest, names: Iterable[str] | None = None, *, alone: bool = False
    ) -> None:
        """Bring files of an output into its folder, those that are missing or cut off there; None means all.

        What lies beside a file under the same name up to the first dot, such as a shard's index, comes along unless
        `alone`. Raises StorageError where a file can't be had with the digest of the manifest.
        """
        named = names if names is None else list(names)
        if not self._missing(folder, manifest, named, alone):
            return
        with exclusive(self._lock(folder)):
            files = [self._object(folder, manifest, entry) for entry in self._missing(folder, manifest, named, alone)]
            with ThreadPoolExecutor(self.config.transfer.threads) as pool, _counted("fetch", manifest, files) as count:
                try:
                    for _ in pool.map(self.objects.download, files):
                        count()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise

    def cached(self, folder: Path, manifest: Manifest) -> Manifest:
        """Return the manifest with those files alone that lie in the folder."""
        files = tuple(entry for entry in manifest.files if (folder / entry.path).is_file())
        return manifest.model_copy(update={"files": files})

    def forget_damaged_copies(self, folder: Path, manifest: Manifest) -> None:
        """Delete the copies of an output's files that differ from its manifest; they are fetched when asked for."""
        for entry in self.cached(folder, manifest).files:
            if file_sha256(folder / entry.path) != entry.sha256:
                (folder / entry.path).unlink()

    def publish(self, folder: Path, manifest: Manifest, *, read_bytes: bool = False) -> bool:
        """Upload a finished output: its files, the pointer of its fingerprint, and last its manifest.

        Return False where another machine finished an output of other bytes for the same fingerprint first: that one
        stands, as if it had been found before anything was computed. Files that the store already holds are left
        alone: by size and noted digest, or with `read_bytes` by every byte. Interrupted anywhere, it can be called
        again; until it returns, no reader finds the output.
        """
        stage, version = manifest.stage, manifest.data_version
        if stage not in self._swept:
            self.objects.abort_stale_uploads(f"{stage}/")
            self._swept.add(stage)
        files = [self._object(folder, manifest, entry) for entry in manifest.files]
        with ThreadPoolExecutor(self.config.transfer.threads) as pool:
            held = list(pool.map(lambda file: self.objects.holds(file, read_bytes=read_bytes), files))
        missing = [file for file, there in zip(files, held, strict=True) if not there]
        with _counted("store", manifest, missing, len(files) - len(missing)) as count:
            self.objects.upload(missing, lambda file: count())
        if not self._point_at(manifest):
            return False
        self._write_manifest(folder, manifest)
        self._note_stored(stage, version)
        return True

    def damaged(self, manifest: Manifest) -> list[str]:
        """Return one sentence for each object of an output that is missing or not what its manifest says.

        Every byte is read from the store; nothing of it is kept.
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
            found = list(pool.map(lambda entry: self._object_problem(manifest, entry), manifest.files))
        return [said for said in (problem, *found) if said is not None]

    def _object_problem(self, manifest: Manifest, entry: FileEntry) -> str | None:
        key = f"{manifest.stage}/{manifest.data_version}/{entry.path}"
        stage = f"{manifest.stage} {manifest.partition or ''}".rstrip()
        found = self.objects.digest(key)
        if found is None:
            return f"{self.objects.url(key)}: missing; re-run {stage}"
        sha256, num_bytes = found
        if num_bytes != entry.num_bytes:
            return f"{self.objects.url(key)}: {num_bytes} bytes, manifest says {entry.num_bytes}; re-run {stage}"
        if sha256 != entry.sha256:
            return (
                f"{self.objects.url(key)}: SHA-256 {sha256[:12]}..., manifest says {entry.sha256[:12]}...; "
                f"re-run {stage}"
            )
        return None

    def _point_at(self, manifest: Manifest) -> bool:
        """Make the fingerprint's pointer name this output, unless it names another one that is finished."""
        stage, version = manifest.stage, manifest.data_version
        key = f"{stage}/{POINTERS}/{manifest.fingerprint}"
        there = self.objects.read(key)
        if there is None:
            if self.objects.write_new(key, version.encode()):
                return True
            there = self.objects.read(key)
        other = (there or b"").decode().strip()
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
        # Another machine was first with the same content: its manifest stays, unless it is damaged.
        there = self.objects.read(key)
        if there is None or _manifest_problem(there, manifest.data_version, "") is not None:
            self.objects.write(key, data)

    def _missing(self, folder: Path, manifest: Manifest, names: Sequence[str] | None, alone: bool) -> list[FileEntry]:
        if names is None:
            wanted: Sequence[FileEntry] = manifest.files
        elif alone:
            wanted = [entry for entry in manifest.files if entry.path in names]
        else:
            wanted = _with_companions(manifest.files, names)
        return [entry for entry in wanted if not _is_whole(folder / entry.path, entry.num_bytes)]

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

    def _note_stored(self, stage: str, version: str) -> None:
        path = self.root / stage / _STORED / version
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _with_companions(files: Sequence[FileEntry], names: Iterable[str]) -> list[FileEntry]:
    stems = {_stem(name) for name in names}
    return [entry for entry in files if _stem(entry.path) in stems]


def _stem(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _is_whole(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except FileNotFoundError:
        return False


def _manifest_problem(data: bytes, version: str, name: str) -> str | None:
    """Say what is wrong with the bytes of a manifest; None where they are that of the data version."""
    try:
        manifest = parse_manifest(data, name)
    except ThroughlineError as error:
        return str(error)
    if manifest.data_version != version:
        return f"{name}: is the manifest of data version {manifest.data_version}"
    return None


@contextmanager
def _counted(
    label: str, manifest: Manifest, files: Sequence[ObjectFile], held: int = 0
) -> Iterator[Callable[[], None]]:
    """Yield what to call after each file, to show progress where there is enough to wait for."""
    if sum(file.num_bytes for file in files) < _QUIET_BYTES:
        yield lambda: None
        return
    label = f"{label} {manifest.stage} {manifest.partition or ''}".rstrip()
    with Progress(label, held + len(files), "files", initial=held) as bar:
        yield bar.advance
