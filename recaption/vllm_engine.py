"""Vision-language engine on vLLM, in the calling process; `recaption.vllm_environment` owns its variables."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.core.errors import ThroughlineError
from recaption.config import VllmEngineConfig
from recaption.engine import VisionAnswer, VisionRequest
from recaption.vllm_environment import vllm_environment


class VllmEngine:
    """A model loaded by vLLM; greedy, with one vLLM call per `generate`."""

    def __init__(self, config: VllmEngineConfig) -> None:
        _check_model_folder(config)
        os.environ.update(vllm_environment(config))
        try:
            import vllm
        except ImportError as error:
            raise ThroughlineError(
                f"vLLM cannot be imported ({error}); install the extra 'cpu' or 'gpu' of this project"
            ) from error
        self._sampling_params = vllm.SamplingParams
        self._request_error: type[Exception] = vllm.exceptions.VLLMValidationError
        self._llm = vllm.LLM(config.model.source, **engine_arguments(config))
        self._tokenizer = self._llm.get_tokenizer()
        self._token_ids: dict[str, int] = {}

    def generate(self, requests: Sequence[VisionRequest]) -> list[VisionAnswer]:
        """Answer all requests in one call, so that batch composition depends on the list alone.

        If vLLM rejects the call because a request is too long, each request is retried alone and only that one fails.
        """
        answers: list[VisionAnswer | None] = [None] * len(requests)
        chats, params, indices = [], [], []
        for index, request in enumerate(requests):
            try:
                chats.append(_chat(request))
            except (OSError, ValueError, SyntaxError) as error:  # Pillow's errors for broken files
                answers[index] = VisionAnswer.failed(f"unreadable image ({type(error).__name__})")
                continue
            params.append(self._params(request))
            indices.append(index)
        for index, answer in zip(indices, self._answer(requests, indices, chats, params), strict=True):
            answers[index] = answer
        return [answer for answer in answers if answer is not None]

    def _answer(
        self, requests: Sequence[VisionRequest], indices: list[int], chats: list[Any], params: list[Any]
    ) -> list[VisionAnswer]:
        if not chats:
            return []
        try:
            outputs = self._llm.chat(chats, params, use_tqdm=False)
        except self._request_error as error:
            if len(chats) == 1:
                return [VisionAnswer.failed(str(error))]
            return [
                self._answer(requests, [index], [chat], [param])[0]
                for index, chat, param in zip(indices, chats, params, strict=True)
            ]
        return [self._read(output, requests[index]) for output, index in zip(outputs, indices, strict=True)]

    def _read(self, output: Any, request: VisionRequest) -> VisionAnswer:
        completion = output.outputs[0]
        logprobs = {}
        if request.want_logprobs_of:
            first_token = completion.logprobs[0]
            logprobs = {word: first_token[self._token_id(word)].logprob for word in request.want_logprobs_of}
        return VisionAnswer(
            text=completion.text.strip(),
            finish_reason=completion.finish_reason,
            num_prompt_tokens=len(output.prompt_token_ids),
            num_answer_tokens=len(completion.token_ids),
            logprobs=logprobs,
        )

    def _params(self, request: VisionRequest) -> Any:
        token_ids = [self._token_id(word) for word in request.want_logprobs_of] or None
        return self._sampling_params(temperature=0.0, max_tokens=request.max_tokens, logprob_token_ids=token_ids)

    def _token_id(self, word: str) -> int:
        if word not in self._token_ids:
            ids = self._tokenizer.encode(word, add_special_tokens=False)
            if len(ids) != 1:
                raise ThroughlineError(f"{word!r} is {len(ids)} tokens in this model; its log-probability needs one")
            self._token_ids[word] = ids[0]
        return self._token_ids[word]


def engine_arguments(config: VllmEngineConfig) -> dict[str, Any]:
    """Return the keyword arguments for ``vllm.LLM``."""
    arguments: dict[str, Any] = {
        "revision": config.model.hub_revision,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "tensor_parallel_size": config.tensor_parallel_size,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "enforce_eager": config.enforce_eager,
        "seed": config.seed,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": config.kv_cache_memory_bytes,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
        # A batch's arithmetic must not depend on cache entries of earlier batches.
        "enable_prefix_caching": False,
        # Each image is used once; a cache of processed images would waste 4 GiB.
        "mm_processor_cache_gb": 0,
        "disable_log_stats": True,
    }
    if config.tensor_parallel_size > 1:
        # Inside a Ray actor, vLLM would request its own Ray workers; the actor already holds the GPUs they need.
        arguments["distributed_executor_backend"] = "mp"
    if config.max_image_px is not None:
        arguments["mm_processor_kwargs"] = {"size": {"shortest_edge": 1, "longest_edge": config.max_image_px}}
    return arguments


def _chat(request: VisionRequest) -> list[dict[str, Any]]:
    from PIL import Image

    image = Image.open(io.BytesIO(request.image_bytes)).convert("RGB")
    content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": request.text}]
    return [{"role": "user", "content": content}]


def _check_model_folder(config: VllmEngineConfig) -> None:
    path = config.model.path
    if path is not None and not (Path(path) / "config.json").is_file():
        raise ThroughlineError(f"{config.model.id}: no model at {path} (no config.json); check the path in the profile")
