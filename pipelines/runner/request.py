"""A resolved request to run a stage: what a fresh process is given, as JSON."""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pipelines.core.atomic import write_json
from pipelines.core.config import FrozenConfig
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import Verify
from pipelines.storage.config import StoreConfig


class StageRequest(FrozenConfig):
    """A resolved request to run a stage: everything a fresh process needs, as JSON."""

    stage: str
    partition: str | None = None
    config: dict[str, Any]
    inputs: dict[str, list[str]] = Field(default_factory=dict)
    """Input name -> paths of manifests, or of single files that lie beside one."""
    output_root: str
    store: StoreConfig | None = None
    """The object store that the output root is mirrored in, for a machine that has not heard of it yet."""
    verify: Verify = "size"
    lock_wait_seconds: float | None = Field(None, ge=0)
    """Longest wait for another process at the same output; None waits as long as that one takes."""

    @classmethod
    def read(cls, path: Path) -> "StageRequest":
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise ThroughlineError(f"{path}: no such request file") from error
        except ValidationError as error:
            raise ThroughlineError(f"{path}: not a stage request: {format_validation_error(error)}") from error


def write_request(path: Path, request: StageRequest) -> None:
    """Write a request where a stage's process can read it."""
    write_json(path, request.model_dump(mode="json"))


def format_validation_error(error: ValidationError) -> str:
    """Return one line that says which field is wrong, and why."""
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'value'}: {item['msg']}" for item in error.errors())
