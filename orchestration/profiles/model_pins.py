"""Pins models: a local folder by its content digest, a hub name without a commit by its current commit.

A profile may leave a model's commit (revision ``main``) or digest (revision ``local``) open. The first lookup resolves
it before a stage sees it, so manifests and fingerprints record what was really loaded. Resolved commits are written to
a lock file, so all later stages and runs use the same one.
"""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from pipelines.core.atomic import write_json
from pipelines.core.config import ModelRef
from pipelines.core.digest import LOCAL_PREFIX, digest_json, file_sha256, model_files
from pipelines.core.errors import ThroughlineError

LOCAL = "local"
"""Revision of a local folder whose digest is computed on use."""
UNPINNED = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_SECONDS = 20
ConfigT = TypeVar("ConfigT", bound=BaseModel)


def is_pinned(model: ModelRef) -> bool:
    """Return whether the revision identifies immutable content."""
    return _COMMIT.fullmatch(model.revision) is not None or model.revision.startswith(LOCAL_PREFIX)


def resolve_models(config: ConfigT, lock_file: Path) -> ConfigT:
    """Return `config` with every model in it pinned, at any depth.

    Raises ThroughlineError if a local folder is missing, or if a hub name has no commit yet and neither the local hub
    cache nor the hub itself provides one.
    """
    changes: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        resolved: Any = value
        if isinstance(value, ModelRef):
            resolved = pinned(value, lock_file)
        elif isinstance(value, BaseModel):
            resolved = resolve_models(value, lock_file)
        if resolved is not value:
            changes[name] = resolved
    return config.model_copy(update=changes) if changes else config


def pinned(model: ModelRef, lock_file: Path) -> ModelRef:
    """Return `model` with a revision that identifies immutable content."""
    if is_pinned(model):
        return model
    if model.path is not None:
        return model.model_copy(update={"revision": LOCAL_PREFIX + folder_digest(Path(model.path), lock_file.parent)})
    return model.model_copy(update={"revision": _hub_commit(model.id, model.revision, lock_file)})


def folder_digest(folder: Path, cache_folder: Path) -> str:
    """Return the digest of a model folder's files by name and content; unchanged files are not read again."""
    files = model_files(folder)
    if not files:
        raise ThroughlineError(f"{folder}: no model here; run `throughline doctor` for the fix")
    state = tuple((path.relative_to(folder).as_posix(), *_state(path)) for path in files)
    return _folder_digest(str(folder), state, str(cache_folder / "model-digests.json"))


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@lru_cache
def _folder_digest(folder: str, state: tuple[tuple[str, int, int], ...], cache_file: str) -> str:
    cache = _read_json(Path(cache_file))
    known: dict[str, list[Any]] = cache.get(folder, {})
    digests = {}
    for name, size, modified in state:
        entry = known.get(name)
        is_unchanged = entry is not None and entry[:2] == [size, modified]
        digests[name] = [size, modified, entry[2] if is_unchanged and entry else file_sha256(Path(folder) / name)]
    if digests != known:
        Path(cache_file).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(cache_file), _read_json(Path(cache_file)) | {folder: digests})
    return digest_json({name: entry[2] for name, entry in digests.items()})


def _hub_commit(model_id: str, revision: str, lock_file: Path) -> str:
    key = f"{model_id}@{revision}"
    known = _read_json(lock_file)
    if key in known:
        return str(known[key])
    commit = _cached_commit(model_id, revision) or _current_commit(model_id, revision)
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    write_json(lock_file, _read_json(lock_file) | {key: commit})
    return commit


def _cached_commit(model_id: str, revision: str) -> str | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    path = Path(HF_HUB_CACHE) / f"models--{model_id.replace('/', '--')}" / "refs" / revision
    try:
        commit = path.read_text().strip()
    except OSError:
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _current_commit(model_id: str, revision: str) -> str:
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        commit = HfApi().model_info(model_id, revision=revision, timeout=_TIMEOUT_SECONDS).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        raise ThroughlineError(
            f"{model_id}: revision {revision!r} is not a commit, and the hub can't be reached for one "
            f"({type(error).__name__}); pin a commit with --set, or run once with access to the hub or its cache"
        ) from error
    if commit is None or not _COMMIT.fullmatch(commit):
        raise ThroughlineError(f"{model_id}: the hub returned {commit!r} for revision {revision!r}, expected a commit")
    return commit


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ThroughlineError(f"{path}: not readable as JSON ({error}); delete it") from error
