"""Which object store holds an output root, and how files travel there."""

from typing import Any, Literal, cast

from pydantic import Field, field_validator, model_validator

from pipelines.core.config import FrozenConfig

SCHEMES = ("s3", "gs", "az")
Scheme = Literal["s3", "gs", "az"]
_DROPPED_FIELDS = frozenset({"stale_upload_hours"})
"""Fields of earlier versions, still found in ``store.json`` and in profile files."""


class TransferConfig(FrozenConfig):
    """How objects travel. Nothing here changes a result."""

    connect_seconds: float = Field(default=10.0, gt=0)
    """Timeout for opening a connection."""
    read_seconds: float = Field(default=60.0, gt=0)
    """Longest silence of the server during a download, a listing or a query."""
    upload_seconds: float = Field(default=300.0, gt=0)
    """Timeout for sending one part, or one file of at most `part_bytes`, silent or not: 16 MiB in 300 s are 56 kB/s."""
    attempts: int = Field(default=6, ge=1, le=20)
    """Attempts per request, with exponential backoff and jitter between them, up to 20 seconds."""
    part_bytes: int = Field(default=16 << 20, ge=5 << 20, le=5 << 30)
    """Larger files are uploaded in parts of this size, or larger parts where there would be over 10,000. S3 accepts no
    less than 5 MiB. Up to `threads` parts are held in memory."""
    threads: int = Field(default=8, ge=1, le=128)

    @model_validator(mode="before")
    @classmethod
    def _drop_old_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if name not in _DROPPED_FIELDS}
        return data


class StoreConfig(FrozenConfig):
    """A prefix in an object store: ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://container/prefix``.

    The prefix may be empty.
    """

    url: str
    transfer: TransferConfig = TransferConfig()

    @field_validator("url")
    @classmethod
    def _is_a_store(cls, url: str) -> str:
        scheme, separator, path = url.partition("://")
        if scheme not in SCHEMES or not separator or not path.strip("/"):
            raise ValueError(f"{url}: expected s3://bucket, gs://bucket or az://container, with or without /prefix")
        return url.rstrip("/")

    @property
    def scheme(self) -> Scheme:
        return cast(Scheme, self.url.partition("://")[0])

    @property
    def path(self) -> str:
        """Bucket and prefix: the URL without its scheme."""
        return self.url.partition("://")[2]

    @property
    def bucket(self) -> str:
        """Bucket, or container of an Azure storage account."""
        return self.path.partition("/")[0]

    @property
    def bucket_url(self) -> str:
        return f"{self.scheme}://{self.bucket}"

    @property
    def prefix(self) -> str:
        """Start of every key, with a trailing slash; empty for a whole bucket."""
        path = self.path.partition("/")[2].strip("/")
        return f"{path}/" if path else ""


def is_store_url(location: str) -> bool:
    """Return whether a location names an object store, by its scheme alone."""
    return location.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))
