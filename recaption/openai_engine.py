"""Vision-language engine for an OpenAI-compatible HTTP endpoint: concurrent requests, each retried on its own."""

import base64
import os
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from pipelines.core.errors import ThroughlineError
from recaption.config import OpenAIEngineConfig
from recaption.engine import VisionAnswer, VisionRequest

_RETRIED_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_FATAL_STATUSES = frozenset({401, 403, 404, 405})
"""Wrong key, wrong path, unknown model: every request would fail alike."""
_TOP_LOGPROBS = 20
"""The maximum that OpenAI's API and vLLM's default server return."""
_MAX_BACKOFF_SECONDS = 60.0
_IMAGE_TYPES = ((b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG\r\n\x1a\n", "image/png"))


class OpenAIEngine:
    """A connection to an endpoint; greedy requests, answered in request order."""

    def __init__(self, config: OpenAIEngineConfig) -> None:
        self._config = config
        key = os.environ.get(config.api_key_variable)
        self._client = httpx.Client(
            base_url=config.base_url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(config.timeout_seconds, connect=min(10.0, config.timeout_seconds)),
            limits=httpx.Limits(max_connections=config.max_concurrency),
        )

    def generate(self, requests: Sequence[VisionRequest]) -> list[VisionAnswer]:
        """Answer all requests. Raises ThroughlineError if the endpoint is down or rejects every request alike."""
        stop = threading.Event()
        failures: list[BaseException] = []

        def ask(request: VisionRequest) -> VisionAnswer | None:
            if stop.is_set():
                return None
            try:
                return self._ask(request, stop)
            except BaseException as error:
                failures.append(error)  # the first is the cause; the other threads only stop because of it
                stop.set()
                raise

        with ThreadPoolExecutor(self._config.max_concurrency) as threads:
            futures = [threads.submit(ask, request) for request in requests]
        if failures:
            raise failures[0]
        return [answer for future in futures if (answer := future.result()) is not None]

    def _ask(self, request: VisionRequest, stop: threading.Event) -> VisionAnswer:
        body = _body(self._config, request)
        backoff_seconds = self._config.first_pause_seconds
        problem = "no attempt was made"
        for attempt in range(self._config.max_attempts):
            if attempt:
                # Jitter, so that requests rejected together do not come back together.
                stop.wait(random.uniform(0.5, 1.5) * backoff_seconds)
                backoff_seconds = min(2 * backoff_seconds, _MAX_BACKOFF_SECONDS)
            if stop.is_set():
                break
            try:
                response = self._client.post("chat/completions", json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if response.status_code in _FATAL_STATUSES:
                raise ThroughlineError(
                    f"{self._config.base_url} returned {response.status_code} ({_excerpt(response)}); check base_url, "
                    f"the model name {self._config.model.id!r} and the key in ${self._config.api_key_variable}"
                )
            if response.status_code in _RETRIED_STATUSES:
                problem = f"HTTP {response.status_code}: {_excerpt(response)}"
                backoff_seconds = max(backoff_seconds, _retry_after_seconds(response))
                continue
            if response.is_error:
                return VisionAnswer.failed(f"HTTP {response.status_code}: {_excerpt(response)}")
            try:
                return _read(response.json(), request)
            except (ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"not a chat completion ({type(error).__name__}: {error})"
        raise ThroughlineError(
            f"{self._config.base_url} gave no answer in {self._config.max_attempts} attempts ({problem}); "
            "check that the endpoint is up, then run again: finished shards are reused"
        )


def _body(config: OpenAIEngineConfig, request: VisionRequest) -> dict[str, Any]:
    image_type = next((name for magic, name in _IMAGE_TYPES if request.image_bytes.startswith(magic)), "image/webp")
    image_url = f"data:{image_type};base64,{base64.b64encode(request.image_bytes).decode()}"
    content = [{"type": "image_url", "image_url": {"url": image_url}}, {"type": "text", "text": request.text}]
    body: dict[str, Any] = {
        "model": config.model.id,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0.0,
        "max_tokens": request.max_tokens,
        "seed": config.seed,
    }
    if request.want_logprobs_of:
        body |= {"logprobs": True, "top_logprobs": _TOP_LOGPROBS}
    return body


def _read(answer: dict[str, Any], request: VisionRequest) -> VisionAnswer:
    choice = answer["choices"][0]
    logprobs = {}
    if request.want_logprobs_of:
        top = {item["token"]: float(item["logprob"]) for item in choice["logprobs"]["content"][0]["top_logprobs"]}
        logprobs = {word: top[word] for word in request.want_logprobs_of if word in top}
    usage = answer.get("usage") or {}
    return VisionAnswer(
        text=(choice["message"].get("content") or "").strip(),
        finish_reason=choice["finish_reason"],
        num_prompt_tokens=int(usage.get("prompt_tokens", 0)),
        num_answer_tokens=int(usage.get("completion_tokens", 0)),
        logprobs=logprobs,
    )


def _excerpt(response: httpx.Response) -> str:
    return " ".join(response.text[:200].split())


def _retry_after_seconds(response: httpx.Response) -> float:
    try:
        return min(float(response.headers.get("Retry-After", "0")), _MAX_BACKOFF_SECONDS)
    except ValueError:
        return 0.0
