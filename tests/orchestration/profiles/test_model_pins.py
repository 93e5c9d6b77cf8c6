import json
from pathlib import Path

import pytest

from orchestration.profiles.model_pins import LOCAL, UNPINNED, folder_digest, is_pinned, pinned, resolve_models
from pipelines.core.config import FrozenConfig, ModelRef
from pipelines.core.errors import ThroughlineError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_local_model_is_pinned_by_its_content(tmp_path: Path) -> None:
    lock = tmp_path / "cache" / "commits.json"
    model = ModelRef(id="tiny", revision=LOCAL, path=str(_model(tmp_path / "a")))
    first = pinned(model, lock)
    assert is_pinned(first)
    copy = ModelRef(id="tiny", revision=LOCAL, path=str(_model(tmp_path / "b")))
    assert pinned(copy, lock).revision == first.revision, "the path does not matter"
    (tmp_path / "a" / "README.md").write_text("a model card is not part of the model")
    assert pinned(model, lock).revision == first.revision
    (tmp_path / "a" / "model.safetensors").write_bytes(b"other weights")
    assert pinned(model, lock).revision != first.revision


def test_unchanged_files_are_read_once(tmp_path: Path) -> None:
    folder, cache = _model(tmp_path / "a"), tmp_path / "cache"
    digest = folder_digest(folder, cache)
    written = json.loads((cache / "model-digests.json").read_bytes())
    written[str(folder)]["config.json"][2] = "0" * 64  # the cache is trusted while the file is unchanged
    (cache / "model-digests.json").write_text(json.dumps(written))
    (folder / "new.json").write_text("{}")
    assert folder_digest(folder, cache) != digest
    assert json.loads((cache / "model-digests.json").read_bytes())[str(folder)]["config.json"][2] == "0" * 64


def test_a_missing_local_model_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ThroughlineError, match="no model here"):
        pinned(ModelRef(id="tiny", revision=LOCAL, path=str(tmp_path / "none")), tmp_path / "commits.json")


def test_a_hub_name_resolves_to_the_cached_commit_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    reference = tmp_path / "hub" / "models--org--name" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text(COMMIT)
    model, lock = ModelRef(id="org/name", revision=UNPINNED), tmp_path / "commits.json"
    assert pinned(model, lock).revision == COMMIT
    reference.write_text("f" * 40)
    assert pinned(model, lock).revision == COMMIT, "a resolved commit is kept, whatever the hub cache holds later"


def test_a_pinned_model_is_unchanged(tmp_path: Path) -> None:
    model = ModelRef(id="org/name", revision=COMMIT)
    assert pinned(model, tmp_path / "commits.json") is model


def test_models_are_pinned_at_any_depth(tmp_path: Path) -> None:
    class Engine(FrozenConfig):
        model: ModelRef

    class Config(FrozenConfig):
        engine: Engine
        size: int = 1

    config = Config(engine=Engine(model=ModelRef(id="tiny", revision=LOCAL, path=str(_model(tmp_path / "a")))))
    resolved = resolve_models(config, tmp_path / "commits.json")
    assert resolved.engine.model.revision.startswith("sha256:")
    assert resolved.size == 1
