"""The one exception type that reaches users as a sentence instead of a traceback."""


class ThroughlineError(Exception):
    """A failure whose message names the object, what was expected, what was found, and the next step."""
