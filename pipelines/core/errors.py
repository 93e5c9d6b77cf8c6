"""The one exception type that reaches users as a sentence, and how others are quoted in it."""

import errno
import json
import os
from collections.abc import Mapping
from types import NoneType
from typing import Any


class ThroughlineError(Exception):
    """A failure whose message names the object, what was expected, what was found, and the next step."""


def first_line(error: BaseException) -> str:
    """Return the first words of an error's message, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def problem_in_words(problem: Mapping[str, Any]) -> str:
    """Return what a pydantic error says of one field, its name left out, with the value found where that is short."""
    said, found = str(problem["msg"]).removeprefix("Value error, "), problem.get("input")
    tells = problem["type"] in ("value_error", "extra_forbidden", "missing")  # its own sentence, or no value to blame
    if tells or not isinstance(found, (str, int, float, NoneType)):
        return said
    return f"{said}, found {json.dumps(found, ensure_ascii=False)}"


_IN_WORDS = {
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "a file stands where its path needs a folder",
    errno.EEXIST: "it is there already, and is not what was expected",
    errno.EISDIR: "expected a file, found a folder",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "its disk can only be read",
    errno.ENOSPC: "its disk is full",
}


def in_plain_words(error: OSError) -> str:
    """Return what the system refused, without the file's name and the number of the error."""
    return _IN_WORDS.get(error.errno or 0) or (os.strerror(error.errno) if error.errno else first_line(error))
