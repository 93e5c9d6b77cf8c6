"""The one exception type that reaches users as a sentence, and how others are quoted in it."""

import errno
import os


class ThroughlineError(Exception):
    """A failure whose message names the object, what was expected, what was found, and the next step."""


def first_line(error: BaseException) -> str:
    """Return the first words of an error's message, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


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
