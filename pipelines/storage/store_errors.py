"""Turns errors of obstore into one sentence: which object, what the server answered, what to do.

obstore reports an answer's status, code and message as text alone, so they are parsed from there.
"""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from pipelines.core.errors import ThroughlineError
from pipelines.storage.config import Scheme

AGAIN = "run the same command again to resume"
_DEBUG = "\n\nDebug source:"
_NO_BUCKET = frozenset({"NoSuchBucket", "ContainerNotFound"})
_REFUSED = frozenset(
    {
        "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "AuthFailure", "RequestExpired",
        "RequestTimeTooSkewed", "AuthenticationFailed", "InvalidAuthenticationInfo", "AuthenticationRequired",
    }
)  # fmt: skip
_OTHER_REGION = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraint"})
_DAMAGED = frozenset(
    {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "RequestTimeout", "Md5Mismatch"}
)
_UPLOAD_LOST = frozenset({"NoSuchUpload", "InvalidPart", "InvalidBlockList"})
_METADATA_HOSTS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal", "token request")

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE for a profile of ~/.aws/credentials",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, the file of an account",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or another credential of Azure",
}
_ENDPOINTS = {
    "s3": "AWS_ENDPOINT_URL_S3 (or AWS_ENDPOINT_URL)",
    "gs": "GOOGLE_BASE_URL",
    "az": "AZURE_STORAGE_ACCOUNT_NAME (or AZURE_STORAGE_ENDPOINT)",
}
_PERMISSIONS = {
    "s3": "s3:ListBucket, s3:GetObject, s3:PutObject and s3:AbortMultipartUpload",
    "gs": "the role Storage Object User",
    "az": "the role Storage Blob Data Contributor",
}


class StorageError(ThroughlineError):
    """A request to an object store failed; the message names the object, the failure and the next step."""


@dataclass(frozen=True)
class Answer:
    """What an error of obstore says about the answer of the server, or about the lack of one."""

    text: str
    """Message of obstore, without the debugging output."""
    status: int
    """HTTP status, 0 where no answer arrived."""
    code: str
    """Error code of the store, such as NoSuchKey; empty where the answer had no body."""
    message: str
    failure: str
    """Timeout, Connect, Interrupted and the like where the connection failed, else empty."""
    cause: str
    """Innermost message of a failed connection."""
    attempts: int
    """How often obstore sent the request; 0 where it does not say."""
    url: str

    @property
    def is_missing_bucket(self) -> bool:
        return self.code in _NO_BUCKET

    @property
    def is_retryable(self) -> bool:
        """Whether the same bytes sent again may arrive; obstore itself retries busy and unreachable servers."""
        return self.code in _DAMAGED | _UPLOAD_LOST

    @property
    def is_unanswered(self) -> bool:
        """Whether the connection failed and obstore did not try again."""
        return bool(self.failure) and self.attempts < 2


def parse_error(error: BaseException) -> Answer:
    """Return what the text of an obstore error says."""
    text, _, debug = str(error).partition(_DEBUG)

    def first(pattern: str, where: str = text) -> str:
        found = re.search(pattern, where, re.DOTALL)
        return found.group(1).strip() if found else ""

    is_http = "HTTP error" in text
    kinds, causes = re.findall(r"kind: (\w+)", debug), re.findall(r'message: "([^"]+)"|error: (\w+)', debug)
    return Answer(
        text=" ".join(text.split()),
        status=int(first(r"status code: (\d{3})") or 0),
        code=first(r"<Code>(.*?)</Code>"),
        message=" ".join(first(r"<Message>(.*?)(?:RequestId:|</Message>)").split()),  # Azure appends ids
        failure=kinds[0] if is_http and kinds else "",
        cause=next(filter(None, causes[-1])) if is_http and causes else "",
        attempts=int(first(r"after (\d+) retries") or -1) + 1,
        url=first(r"Error performing [A-Z]+ (\S+)"),
    )


def no_credentials(scheme: Scheme, bucket_url: str) -> str:
    return f"{bucket_url}: no credentials; set {_CREDENTIALS[scheme]}"


def sentence(scheme: Scheme, object_url: str, bucket_url: str, answer: Answer) -> str:
    """Return one sentence for a failed request."""
    reply = f"{answer.code} {answer.message}".strip().rstrip(".")
    times = f", {answer.attempts} times" if answer.attempts > 1 else ""
    host = urlsplit(answer.url)
    if answer.is_missing_bucket:
        return f"{bucket_url}: no such bucket; create it, or correct the URL"
    if any(name in answer.text for name in _METADATA_HOSTS) and answer.code not in _REFUSED:
        return no_credentials(scheme, bucket_url)
    if answer.code in _REFUSED or answer.status == 401:
        reason = reply or answer.status
        return f"{bucket_url}: the credentials were refused ({reason}); check the clock, {_CREDENTIALS[scheme]}"
    if answer.code in _OTHER_REGION or answer.status == 301 or "configured region" in answer.text:
        return f"{bucket_url}: the bucket is in another region ({reply or 'redirected'}); set AWS_DEFAULT_REGION"
    if answer.status == 403:
        reason = f" ({reply})" if reply else ""
        return f"{object_url}: access denied{reason}; the credentials need {_PERMISSIONS[scheme]} there"
    if answer.failure == "Connect":
        return (
            f"{bucket_url}: no connection to {host.scheme}://{host.netloc}/; check {_ENDPOINTS[scheme]} and the network"
        )
    if answer.failure == "Timeout":
        return f"{object_url}: no answer in time{times}; {AGAIN}"
    if answer.failure:
        cause = f" ({answer.cause})" if answer.cause else ""
        return f"{object_url}: the connection broke{cause}{times}; {AGAIN}"
    if answer.status >= 500 or answer.status == 429:
        return f"{object_url}: the server answered {answer.status} {reply}{times}; {AGAIN}"
    if answer.status == 412:
        return f"{object_url}: the object was replaced while it was read; {AGAIN}"
    if answer.status:
        return f"{object_url}: {f'the server answered {answer.status} {reply}'.rstrip()}; check URL and endpoint"
    reason = answer.text.partition(" error: ")[2] or answer.text
    return f"{object_url}: {reason[:300].rstrip('.')}; check the URL, {_CREDENTIALS[scheme]}"
