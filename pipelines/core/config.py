"""Configuration shared by every stage: what is part of a result's identity, and what only says how it is computed."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


class FrozenConfig(BaseModel):
    """Base of every configuration: immutable, strict about unknown names, validated when built."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def execution_field(default: Any = ..., **kwargs: Any) -> Any:
    """Declare a field that says how or where to compute (workers, ports, paths), never what comes out.

    Such fields are recorded in the manifest but stay out of fingerprint and data version, so that another machine or
    another number of workers meets the same results.
    """
    return Field(default, json_schema_extra={"identity": False}, **kwargs)


def added_field(default: Any, **kwargs: Any) -> Any:
    """Declare a field that came to a configuration when outputs of it existed already.

    At its default, which must mean what happened before, it stays out of fingerprint and data version, so that these
    outputs are still found.
    """
    return Field(default, json_schema_extra={"identity": "unless default"}, **kwargs)


def _is_identity(field: FieldInfo, value: Any) -> bool:
    extra = field.json_schema_extra
    identity = extra.get("identity") if isinstance(extra, dict) else None
    return identity is not False and (identity != "unless default" or value != field.default)


def identity_of(value: Any) -> Any:
    """Return the JSON form of a configuration with every execution field left out, at any depth, and every added field
    at its default."""
    if isinstance(value, BaseModel):
        values = {name: (field, getattr(value, name)) for name, field in type(value).model_fields.items()}
        return {name: identity_of(item) for name, (field, item) in values.items() if _is_identity(field, item)}
    if isinstance(value, dict):
        return {str(key): identity_of(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [identity_of(item) for item in value]
    return _plain(value)


def _plain(value: Any) -> Any:
    enum_value = getattr(value, "value", value)
    return enum_value if isinstance(enum_value, (str, int, float, bool, type(None))) else str(enum_value)


class ModelRef(FrozenConfig):
    """A pinned model: a hub id with a commit, or a local folder whose revision is its content digest."""

    id: str = Field(min_length=1)
    """Hub repository ("Qwen/Qwen3-VL-4B-Instruct") or a name for a local model."""
    revision: str = Field(min_length=1)
    """Hub commit, or ``sha256:`` and the folder's digest for a local model."""
    path: str | None = execution_field(None)
    """Local folder that holds the model; None loads `id` from the hub cache."""

    @property
    def source(self) -> str:
        """What `from_pretrained` is given: the local folder, or the hub id."""
        return self.path or self.id

    @property
    def hub_revision(self) -> str | None:
        """The revision to pass beside `source`; None for a local folder."""
        return None if self.path else self.revision
