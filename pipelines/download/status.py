"""What became of a row that was to be downloaded: one word each, from the URL to the finished picture."""

from enum import StrEnum


class FetchStatus(StrEnum):
    """`ok`, or the reason why the row ends at the download."""

    OK = "ok"
    # Never asked, at the row's own URL or at a hop of a redirect
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
    # An answer, but no picture
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
    # A body, but no use as a picture
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
    # A picture, but not the one that the source table speaks of
    DRIFTED = "drifted"


MAY_HEAL = frozenset(
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
"""Statuses for which another attempt is worth its cost."""

MAY_HEAL_LATER = MAY_HEAL | {
    FetchStatus.TLS_ERROR,
    FetchStatus.BAD_HTTP,
    FetchStatus.HTTP_UNEXPECTED,
    FetchStatus.BODY_EMPTY,
}
"""Statuses for which another attempt on another day is: certificates are renewed, and servers mended."""

TIMEOUTS = frozenset({FetchStatus.CONNECT_TIMEOUT, FetchStatus.READ_TIMEOUT, FetchStatus.TOTAL_TIMEOUT})

NO_FAILURE = frozenset({FetchStatus.OK, FetchStatus.OPTED_OUT, FetchStatus.URL_DENIED, FetchStatus.DOMAIN_DENIED})
"""Statuses that say nothing is wrong with network, server or configuration."""
