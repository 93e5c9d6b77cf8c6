"""Resolved requests to run a stage, passed to a fresh process as JSON."""

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
    """Input name -> paths of manifests, or of single files in the same folder as their manifest."""
    output_root: str
    store: StoreConfig | None = None
    """The object store in which the output root is mirrored, for a machine on which the root is not set up yet."""
    verify: Verify = "size"
    lock_wait_seconds: float | None = Field(None, ge=0)
    """Longest wait for another process that computes the same output; None waits without limit."""

    @classmethod
    def read(cls, path: Path) -> "StageRequest":
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise ThroughlineError(f"{path}: no such request file") from error
        except ValidationError as error:
            raise ThroughlineError(f"{path}: not a stage request: {format_validation_error(error)}") from error


def write_request(path: Path, request: StageRequest) -> None:
    """Write a request as a file."""
    write_json(path, request.model_dump(mode="json"))


def format_validation_error(error: ValidationError) -> str:
    """Return one line that names each invalid field with the reason."""
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'value'}: {item['msg']}" for item in error.errors())
