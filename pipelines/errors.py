"""The one exception type that reaches users as a sentence, and how others are quoted in it."""


class ThroughlineError(Exception):
    """A failure whose message names the object, what was expected, what was found, and the next step."""


def first_line(error: BaseException) -> str:
    """Return the first words of an error's message, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
