"""Clients of obstore: credentials, endpoint and region are found as by other tools of each cloud.

obstore reads the variables of AWS, Google and Azure, and asks the metadata service of a machine. It does not read the
profile files of AWS: those are read by boto3, where it is installed.
"""

import os
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipelines.core.errors import ThroughlineError
from pipelines.storage.config import StoreConfig
from pipelines.storage.store_errors import StorageError, no_credentials, parse_error, sentence

_AWS_HOST = ".amazonaws.com"
_AWS_FILES = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
_AWS_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_SKIP_SIGNATURE",
)  # fmt: skip
_SIGNATURE_MINUTES = 14
"""A request is signed once for all its attempts; AWS refuses a signature that is older than 15 minutes."""
_PROFILE_TTL = timedelta(minutes=5)
"""boto3 renews credentials that expire; it is asked this often."""

_process: int | None = None


def is_forked() -> bool:
    """Return whether a parent of this process used obstore before the fork: its calls would wait forever here."""
    return _process is not None and _process != os.getpid()


def require_obstore(config: StoreConfig) -> None:
    """Raise ThroughlineError where obstore is not installed."""
    if find_spec("obstore") is None:
        raise ThroughlineError(
            f"{config.url}: the package obstore is not installed; install the extra 'store' of this project"
        )


def connect(config: StoreConfig, request_seconds: float) -> Any:
    """Return an obstore store over a whole bucket.

    `request_seconds` limits the silence of the server while a response is received, and the whole time that a request
    takes to send: the HTTP client does not see progress in sending. Raises ThroughlineError where a package, a
    variable or a profile is missing.
    """
    global _process
    require_obstore(config)
    from obstore.exceptions import BaseError
    from obstore.store import AzureStore, GCSStore, S3Store

    if _process is None:
        _process = os.getpid()
    transfer = config.transfer
    client_options: dict[str, Any] = {
        "allow_http": True,  # for endpoints of one's own
        "connect_timeout": timedelta(seconds=transfer.connect_seconds),
        "read_timeout": timedelta(seconds=request_seconds),
        "timeout": timedelta(days=7),
    }
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        client_options["root_certificate"] = Path(bundle).read_bytes()
    options: dict[str, Any] = {
        "client_options": client_options,
        "retry_config": {
            "max_retries": transfer.attempts - 1,
            "retry_timeout": timedelta(minutes=_SIGNATURE_MINUTES),
            "backoff": {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=20), "base": 3},
        },
    }
    try:
        if config.scheme == "gs":
            return GCSStore(config.bucket, **options)
        if config.scheme == "az":
            return AzureStore(config.bucket, **options)
        return S3Store(config.bucket, **options, **_profile_options(config))
    except BaseError as error:
        answer = parse_error(error)
        raise StorageError(sentence(config.scheme, config.bucket_url, config.bucket_url, answer)) from error


def _profile_options(config: StoreConfig) -> dict[str, Any]:
    """Return credentials, region and endpoint of AWS's profile files; variables take precedence over them."""
    options: dict[str, Any] = {}
    files = [Path(os.environ.get(name, default)).expanduser() for name, default in _AWS_FILES.items()]
    if any(path.is_file() for path in files) or "AWS_PROFILE" in os.environ:
        options = _read_profile(config)
    has_credentials = "credential_provider" in options or any(name in os.environ for name in _AWS_CREDENTIALS)
    if not has_credentials and os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        raise StorageError(no_credentials("s3", config.bucket_url))
    return options


def _read_profile(config: StoreConfig) -> dict[str, Any]:
    try:
        from boto3.session import Session
        from botocore.exceptions import BotoCoreError
    except ModuleNotFoundError as error:
        if "AWS_PROFILE" not in os.environ:
            return {}
        raise ThroughlineError(
            f"{config.url}: AWS_PROFILE is set, but boto3, which reads profiles, is not installed; install the extra "
            "'s3' of this project, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    from obstore.auth.boto3 import Boto3CredentialProvider

    options: dict[str, Any] = {}
    try:
        session = Session()
        region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
        options["region"] = region
        endpoint = session.client("s3", region_name=region).meta.endpoint_url
        if _AWS_HOST not in endpoint:
            options["endpoint"] = endpoint
        if not any(name in os.environ for name in _AWS_CREDENTIALS) and session.get_credentials() is not None:
            options["credential_provider"] = Boto3CredentialProvider(session, ttl=_PROFILE_TTL)
    except BotoCoreError as error:
        raise StorageError(f"{config.bucket_url}: {error}; check the AWS settings of this machine") from error
    return options
