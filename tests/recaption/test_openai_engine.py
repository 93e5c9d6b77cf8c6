import base64
import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipelines.core.config import ModelRef
from pipelines.core.errors import ThroughlineError
from recaption.config import OpenAIEngineConfig
from recaption.engines import load_engine
from tests.recaption.conftest import noise_jpeg, request

Answer = tuple[int, dict[str, str], bytes]


class Endpoint:
    """A local chat-completions server that replies with `respond`: (request text, attempt number) -> response."""

    def __init__(self) -> None:
        self.num_attempts: Counter[str] = Counter()
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.num_concurrent = self.max_concurrent = 0
        self.respond: Callable[[str, int], Answer] = lambda text, attempt: completion(f"answer to {text}")
        self.lock = threading.Lock()

    def handle(self, body: dict, headers: dict[str, str]) -> Answer:
        text = body["messages"][0]["content"][1]["text"]
        with self.lock:
            self.num_attempts[text] += 1
            attempt = self.num_attempts[text]
            self.bodies.append(body)
            self.headers.append(headers)
            self.num_concurrent += 1
            self.max_concurrent = max(self.max_concurrent, self.num_concurrent)
        try:
            return self.respond(text, attempt)
        finally:
            with self.lock:
                self.num_concurrent -= 1


def completion(text: str, logprobs: dict[str, float] | None = None) -> Answer:
    choice: dict = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if logprobs is not None:
        top = [{"token": token, "logprob": value} for token, value in logprobs.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": -0.1, "top_logprobs": top}]}
    usage = {"prompt_tokens": 20, "completion_tokens": 3}
    return 200, {}, json.dumps({"choices": [choice], "usage": usage}).encode()


@pytest.fixture
def endpoint() -> Iterator[tuple[Endpoint, str]]:
    behaviour = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                status, headers, content = 404, {}, b"no such path"
            else:
                status, headers, content = behaviour.handle(
                    body, {name.lower(): value for name, value in self.headers.items()}
                )
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client timed out
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield behaviour, f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def make_engine(url: str, **kwargs: object):
    settings = {"timeout_seconds": 5.0, "max_attempts": 4, "first_pause_seconds": 0.01, "max_concurrency": 8} | kwargs
    return load_engine(OpenAIEngineConfig(model=ModelRef(id="judge", revision="r1"), base_url=url, **settings))


def test_requests_run_concurrently_and_are_answered_in_order(endpoint):
    behaviour, url = endpoint

    def respond(text: str, attempt: int) -> Answer:
        time.sleep(0.05 if int(text) % 2 else 0.01)
        return completion(f"answer {text}")

    behaviour.respond = respond
    answers = make_engine(url).generate([request(1, str(number)) for number in range(32)])
    assert [answer.text for answer in answers] == [f"answer {number}" for number in range(32)]
    assert 2 <= behaviour.max_concurrent <= 8
    assert (answers[0].num_prompt_tokens, answers[0].num_answer_tokens, answers[0].finish_reason) == (20, 3, "stop")


def test_the_request_is_greedy_with_the_image_before_the_text(endpoint, monkeypatch):
    behaviour, url = endpoint
    monkeypatch.setenv("JUDGE_KEY", "secret")
    make_engine(url, api_key_variable="JUDGE_KEY").generate([request(1, "What?", 7)])
    body = behaviour.bodies[0]
    image, text = body["messages"][0]["content"]
    assert base64.b64decode(image["image_url"]["url"].removeprefix("data:image/jpeg;base64,")) == noise_jpeg(1)
    assert text == {"type": "text", "text": "What?"}
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0.0, 7)
    assert "logprobs" not in body
    assert behaviour.headers[0]["authorization"] == "Bearer secret"


def test_no_key_is_sent_but_that_of_the_named_variable(endpoint, monkeypatch):
    behaviour, url = endpoint
    monkeypatch.setenv("OPENAI_API_KEY", "for another host")
    make_engine(url, api_key_variable="UNSET_KEY").generate([request(1)])
    assert "authorization" not in behaviour.headers[0]
    assert "for another host" not in behaviour.headers[0].values()


def test_a_word_that_the_endpoint_does_not_return_has_no_logprob(endpoint):
    behaviour, url = endpoint
    behaviour.respond = lambda text, attempt: completion("Yes", {"Yes": -0.1, "yes": -3.0})
    answer = make_engine(url).generate([request(1, "?", 1, want_logprobs_of=("Yes", "No"))])[0]
    assert answer.logprobs == {"Yes": -0.1}
    assert behaviour.bodies[0]["top_logprobs"] == 20


@pytest.mark.parametrize(
    "response",
    [
        (500, {}, b"internal"),
        (429, {"Retry-After": "0.02"}, b"slow down"),
        (200, {}, b"<html>not json</html>"),
        (200, {}, b'{"choices": []}'),
        (503, {"Retry-After": "soon"}, b""),
    ],
)
def test_a_transient_failure_is_retried(endpoint, response):
    behaviour, url = endpoint
    behaviour.respond = lambda text, attempt: response if attempt < 3 else completion("fine")
    assert make_engine(url).generate([request(1, "?")])[0].text == "fine"
    assert behaviour.num_attempts["?"] == 3


def test_a_stalled_request_is_retried(endpoint):
    behaviour, url = endpoint

    def respond(text: str, attempt: int) -> Answer:
        if attempt == 1:
            time.sleep(1.0)
        return completion("fine")

    behaviour.respond = respond
    assert make_engine(url, timeout_seconds=0.2).generate([request(1, "?")])[0].text == "fine"


def test_a_rejected_request_fails_alone(endpoint):
    behaviour, url = endpoint
    behaviour.respond = lambda text, attempt: (400, {}, b"image too large") if text == "bad" else completion("fine")
    good, bad = make_engine(url).generate([request(1, "good"), request(1, "bad")])
    assert good.text == "fine"
    assert (bad.finish_reason, bad.error) == ("error", "HTTP 400: image too large")
    assert behaviour.num_attempts["bad"] == 1


def test_a_lasting_failure_stops_with_one_sentence(endpoint):
    behaviour, url = endpoint
    behaviour.respond = lambda text, attempt: (500, {}, b"internal")
    with pytest.raises(ThroughlineError, match=r"gave no answer in 4 attempts \(HTTP 500: internal\)"):
        make_engine(url).generate([request(1, str(number)) for number in range(20)])


def test_a_wrong_key_stops_immediately(endpoint):
    behaviour, url = endpoint
    behaviour.respond = lambda text, attempt: (401, {}, b"no such key")
    with pytest.raises(ThroughlineError, match=r"returned 401 \(no such key\); check base_url"):
        make_engine(url, max_concurrency=1).generate([request(1, str(number)) for number in range(5)])
    assert sum(behaviour.num_attempts.values()) == 1


def test_an_unreachable_endpoint_is_reported_in_one_sentence():
    with pytest.raises(ThroughlineError, match="gave no answer in 2 attempts"):
        make_engine("http://127.0.0.1:9/v1", max_attempts=2).generate([request(1)])
