"""What an object store's client says when it fails, as one sentence: which object, what was seen, what to do."""

from typing import Any

from pipelines.core.errors import ThroughlineError

AGAIN = "run the same command again: it goes on where it stopped"
_REFUSED = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "AuthFailure", "RequestExpired"}
)
_OTHER_REGION = frozenset({"PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraint"})
_ENDPOINT = "AWS_ENDPOINT_URL_S3 (or AWS_ENDPOINT_URL)"


class StorageError(ThroughlineError):
    """An object store did not do what was asked; the message names the object, what was seen and what to do."""


def error_code(error: Any) -> str:
    """Return the S3 error code of a ClientError, such as NoSuchKey; a bare status where the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def sentence(place: str, bucket: str, error: Exception, attempts: int) -> str:
    """Return what to tell people; `place` and `bucket` are URLs, `attempts` is how often the client tried."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    if isinstance(error, exceptions.ClientError):
        return _refusal(place, bucket, error, attempts)
    if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
        return (
            f"{bucket}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE for a profile "
            "of ~/.aws/credentials"
        )
    if isinstance(error, (exceptions.EndpointConnectionError, exceptions.ConnectTimeoutError)):
        endpoint = error.kwargs.get("endpoint_url", "the endpoint")
        return f"{bucket}: no connection to {endpoint}; check {_ENDPOINT} and the network"
    if isinstance(error, exceptions.ReadTimeoutError):
        return f"{place}: no answer in time, {attempts} times; {AGAIN}"
    if isinstance(error, exceptions.HTTPClientError):
        reason = str(error.kwargs.get("error", error)).rstrip(".")
        return f"{place}: the connection broke {attempts} times ({reason}); {AGAIN}"
    if isinstance(error, ResponseParserError):
        return f"{bucket}: what answers there is no S3 server; check {_ENDPOINT}"
    return f"{place}: {str(error).rstrip('.')}; check the AWS settings of this machine"


def _refusal(place: str, bucket: str, error: Any, attempts: int) -> str:
    code, status = error_code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    said = f"{code} {error.response.get('Error', {}).get('Message', '')}".strip().rstrip(".")
    if code == "NoSuchBucket":
        return f"{bucket}: no such bucket; create it, or correct the URL"
    if code in _REFUSED:
        return f"{bucket}: the credentials were refused ({said}); check AWS_ACCESS_KEY_ID, its secret and the clock"
    if code in _OTHER_REGION:
        return f"{bucket}: lies in another region ({said}); set AWS_DEFAULT_REGION"
    if status == 403:
        return (
            f"{place}: access denied ({said}); the credentials need s3:ListBucket, s3:GetObject, s3:PutObject, "
            "s3:ListBucketMultipartUploads and s3:AbortMultipartUpload there"
        )
    if status >= 500 or status == 429:
        return f"{place}: the server answered {status} {said}, {attempts} times; {AGAIN}"
    if status == 412:
        return f"{place}: was replaced while it was read; {AGAIN}"
    return f"{place}: the server answered {status} {said}; check URL and endpoint"
