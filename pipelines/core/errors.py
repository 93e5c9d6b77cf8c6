"""The exception whose message is shown to users, and the wording of other errors inside such messages."""

import errno
import json
import os
from collections.abc import Mapping
from types import NoneType
from typing import Any


class ThroughlineError(Exception):
    """A failure whose message names the object, what was expected, what was found, and the next step."""


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's message, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def problem_in_words(problem: Mapping[str, Any]) -> str:
    """Return the message of one pydantic error without its field name, with the invalid value if that is short."""
    message, value = str(problem["msg"]).removeprefix("Value error, "), problem.get("input")
    is_complete = problem["type"] in ("value_error", "extra_forbidden", "missing")  # our own wording, or no value
    if is_complete or not isinstance(value, (str, int, float, NoneType)):
        return message
    return f"{message}, found {json.dumps(value, ensure_ascii=False)}"


_OS_ERROR_MESSAGES = {
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "a parent of this path is a file, not a folder",
    errno.EEXIST: "already exists and is not what was expected",
    errno.EISDIR: "expected a file, found a folder",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the disk is read-only",
    errno.ENOSPC: "the disk is full",
}


def os_error_message(error: OSError) -> str:
    """Return the reason for an operating-system error, without file name and error number."""
    known = _OS_ERROR_MESSAGES.get(error.errno or 0)
    return known or (os.strerror(error.errno) if error.errno else first_line(error))
