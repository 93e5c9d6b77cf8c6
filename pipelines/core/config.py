"""Base classes of configuration, and the distinction between fields that shape a result and execution settings."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


class FrozenConfig(BaseModel):
    """Base of every configuration: immutable, rejects unknown fields, validated when built."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def execution_field(default: Any = ..., **kwargs: Any) -> Any:
    """Declare a field that controls how or where to compute (workers, ports, paths) and never changes the result.

    Such fields are recorded in the manifest but excluded from fingerprint and data version, so that results are reused
    on another machine or with another number of workers.
    """
    return Field(default, json_schema_extra={"identity": False}, **kwargs)


def added_field(default: Any, **kwargs: Any) -> Any:
    """Declare a field that was added to a configuration after outputs of it already existed.

    Its default must preserve the previous behaviour. At the default it is excluded from fingerprint and data version,
    so that existing outputs are still found.
    """
    return Field(default, json_schema_extra={"identity": "unless default"}, **kwargs)


def _is_identity(field: FieldInfo, value: Any) -> bool:
    extra = field.json_schema_extra
    identity = extra.get("identity") if isinstance(extra, dict) else None
    return identity is not False and (identity != "unless default" or value != field.default)


def identity_of(value: Any) -> Any:
    """Return the JSON form of a configuration without execution fields, and without added fields at their default, at
    any depth."""
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
    """Local folder with the model; None loads `id` from the hub cache."""

    @property
    def source(self) -> str:
        """Argument for `from_pretrained`: the local folder, or the hub id."""
        return self.path or self.id

    @property
    def hub_revision(self) -> str | None:
        """Revision to pass along with `source`; None for a local folder."""
        return None if self.path else self.revision
