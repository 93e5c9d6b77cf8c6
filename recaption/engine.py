"""What captions and judges ask of a vision-language model: one image and one text in, one answer out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from recaption.config import EngineConfig, OpenAIEngineConfig

ERROR = "error"
"""Finish reason of a request that got no answer; `VisionAnswer.error` says why."""


@dataclass(frozen=True, kw_only=True)
class VisionRequest:
    """One question about one image. The image goes first, then the text, through the model's own chat template."""

    image_bytes: bytes
    """An encoded image (JPEG, PNG or WebP)."""
    text: str
    max_tokens: int
    """Longest answer, in tokens."""
    want_logprobs_of: tuple[str, ...] = ()
    """Words, each one token of the model, whose log-probability at the first answer token is wanted."""


@dataclass(frozen=True, kw_only=True)
class VisionAnswer:
    """The greedy answer to one request."""

    text: str
    finish_reason: str
    """"stop" (the model ended), "length" (cut at max_tokens) or `ERROR`."""
    num_prompt_tokens: int
    """Tokens of template, image and text."""
    num_answer_tokens: int
    logprobs: Mapping[str, float] = field(default_factory=dict)
    """Natural log-probability at the first answer token, before any mask, for each wanted word. An endpoint that tells
    only its most likely tokens leaves out the others: a missing word is less likely than every one it told."""
    error: str | None = None

    @classmethod
    def failed(cls, error: str) -> "VisionAnswer":
        """Return the answer of a request that failed for reasons of its own."""
        return cls(text="", finish_reason=ERROR, num_prompt_tokens=0, num_answer_tokens=0, error=error)


class VisionLanguageEngine(Protocol):
    """A loaded model or a connection to one.

    An engine answers a request that cannot be served (unreadable image, too long) with `VisionAnswer.failed`, and
    raises where the fault is not the request's.
    """

    def generate(self, requests: Sequence[VisionRequest]) -> list[VisionAnswer]:
        """Return one answer for each request, in order: the same list for the same requests."""
        ...


def load_engine(config: EngineConfig) -> VisionLanguageEngine:
    """Load the engine in this process. Raises ThroughlineError where its package or model is missing."""
    if isinstance(config, OpenAIEngineConfig):
        from recaption.openai_engine import OpenAIEngine

        return OpenAIEngine(config)
    from recaption.vllm_engine import VllmEngine

    return VllmEngine(config)
