"""Outcome of downloading one row, as a status word."""

from enum import StrEnum


class FetchStatus(StrEnum):
    """`ok`, or the reason why the row ends at the download."""

    OK = "ok"
    # Not requested: the row's own URL or a redirect target
    BAD_URL = "bad_url"
    BLOCKED_ADDRESS = "blocked_address"
    URL_DENIED = "url_denied"
    DOMAIN_DENIED = "domain_denied"
    # No answer
    DNS_ERROR = "dns_error"
    CONNECT_ERROR = "connect_error"
    CONNECT_TIMEOUT = "connect_timeout"
    TLS_ERROR = "tls_error"
    READ_TIMEOUT = "read_timeout"
    TOTAL_TIMEOUT = "total_timeout"
    DISCONNECTED = "disconnected"
    BAD_HTTP = "bad_http"
    # A response without a body to use
    BAD_REDIRECT = "bad_redirect"
    REDIRECT_LOOP = "redirect_loop"
    TOO_MANY_REDIRECTS = "too_many_redirects"
    HTTP_NOT_FOUND = "http_not_found"
    HTTP_FORBIDDEN = "http_forbidden"
    HTTP_TOO_MANY_REQUESTS = "http_too_many_requests"
    HTTP_CLIENT_ERROR = "http_client_error"
    HTTP_SERVER_ERROR = "http_server_error"
    HTTP_UNEXPECTED = "http_unexpected"
    OPTED_OUT = "opted_out"
    BODY_TOO_LARGE = "body_too_large"
    BODY_EMPTY = "body_empty"
    BODY_INCOMPLETE = "body_incomplete"
    BAD_CONTENT_ENCODING = "bad_content_encoding"
    # A body that is not a usable image
    HTML = "html"
    NOT_AN_IMAGE = "not_an_image"
    FORMAT_NOT_ALLOWED = "format_not_allowed"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_SMALL = "too_small"
    ASPECT_EXTREME = "aspect_extreme"
    ANIMATED = "animated"
    IMAGE_TRUNCATED = "image_truncated"
    IMAGE_CORRUPT = "image_corrupt"
    DECODER_CRASHED = "decoder_crashed"
    DECODE_TIMEOUT = "decode_timeout"
    # An image, but with another SHA-256 than the source table states
    DRIFTED = "drifted"


RETRYABLE = frozenset(
    {
        FetchStatus.DNS_ERROR,
        FetchStatus.CONNECT_ERROR,
        FetchStatus.CONNECT_TIMEOUT,
        FetchStatus.READ_TIMEOUT,
        FetchStatus.TOTAL_TIMEOUT,
        FetchStatus.DISCONNECTED,
        FetchStatus.HTTP_TOO_MANY_REQUESTS,
        FetchStatus.HTTP_SERVER_ERROR,
        FetchStatus.BODY_INCOMPLETE,
    }
)
"""Transient failures, for which a retry is worthwhile."""

RETRYABLE_LATER = RETRYABLE | {
    FetchStatus.TLS_ERROR,
    FetchStatus.BAD_HTTP,
    FetchStatus.HTTP_UNEXPECTED,
    FetchStatus.BODY_EMPTY,
}
"""Failures for which a retry on another day is worthwhile: certificates are renewed and servers repaired."""

TIMEOUTS = frozenset({FetchStatus.CONNECT_TIMEOUT, FetchStatus.READ_TIMEOUT, FetchStatus.TOTAL_TIMEOUT})

NOT_FAILURES = frozenset({FetchStatus.OK, FetchStatus.OPTED_OUT, FetchStatus.URL_DENIED, FetchStatus.DOMAIN_DENIED})
"""Statuses that do not indicate a problem with network, server or configuration."""
