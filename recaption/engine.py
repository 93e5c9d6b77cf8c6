"""The interface of vision-language engines, for captions and judges: one image and one text in, one answer out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

ERROR = "error"
"""Finish reason of a request without an answer; `VisionAnswer.error` says why."""


@dataclass(frozen=True, kw_only=True)
class VisionRequest:
    """One question about one image. The image goes first, then the text, through the model's own chat template."""

    image_bytes: bytes
    """An encoded image (JPEG, PNG or WebP)."""
    text: str
    max_tokens: int
    """Maximum length of the answer."""
    want_logprobs_of: tuple[str, ...] = ()
    """Words, each a single token of the model, whose log-probability at the first answer token to return."""


@dataclass(frozen=True, kw_only=True)
class VisionAnswer:
    """The greedy answer to one request."""

    text: str
    finish_reason: str
    """"stop" (the model ended), "length" (truncated at max_tokens) or `ERROR`."""
    num_prompt_tokens: int
    """Tokens of template, image and text."""
    num_answer_tokens: int
    logprobs: Mapping[str, float] = field(default_factory=dict)
    """Natural log-probability at the first answer token, before any masking, of each requested word. An endpoint may
    return its most likely tokens only: a missing word is less likely than all of them."""
    error: str | None = None

    @classmethod
    def failed(cls, error: str) -> "VisionAnswer":
        """Return the answer to a request that failed through its own fault."""
        return cls(text="", finish_reason=ERROR, num_prompt_tokens=0, num_answer_tokens=0, error=error)


class VisionLanguageEngine(Protocol):
    """A loaded model or a connection to one.

    An engine answers a request that it cannot serve (unreadable image, too long) with `VisionAnswer.failed`. It raises
    if the fault is not the request's.
    """

    def generate(self, requests: Sequence[VisionRequest]) -> list[VisionAnswer]:
        """Return one answer per request, in order. The same list of requests gives the same answers."""
        ...
