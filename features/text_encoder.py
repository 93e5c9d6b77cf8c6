"""The frozen text encoder: a decoder-only language model, and the hidden states of its layers.

Shapes: L selected layers, S tokens of a text, C channels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from features.templates import apply_template
from pipelines.core.config import ModelRef
from pipelines.core.errors import ThroughlineError, first_line

STORED_TYPE = torch.bfloat16
"""Type of hidden states as returned and stored, so that sampling sees the values that training read from the cache."""


@dataclass(frozen=True)
class EncodedText:
    """A text's tokens and hidden states, without padding."""

    token_ids: Tensor
    """(S,) int32"""
    hidden_states: Tensor
    """(L, S, C) in `STORED_TYPE`: the selected entries of hidden_states[1..], without the embedding output (0). The
    last layer's entry comes after the final norm, as in transformers."""
    was_truncated: bool = False


class TextEncoder:
    """A loaded encoder. Texts are padded on the right and attention is causal, so no text depends on its batch."""

    def __init__(
        self, model: Any, tokenizer: Any, *, ref: ModelRef, layers: Sequence[int] | None, template_version: str,
        max_tokens: int,
    ) -> None:  # fmt: skip
        self._model = model
        self._tokenizer = tokenizer
        self.ref = ref
        self.template_version = template_version
        self.max_tokens = max_tokens
        num_layers = model.config.num_hidden_layers
        self.layers = tuple(layers) if layers is not None else tuple(range(1, num_layers + 1))
        """The selected entries of hidden_states, numbered as in transformers: 1 is the first layer's output."""
        if min(self.layers) < 1 or max(self.layers) > num_layers:
            raise ThroughlineError(f"{ref.id} has layers 1 to {num_layers}, not all of {self.layers}")
        self.width: int = model.config.hidden_size
        self._empty_text_ids = [_edge_token(tokenizer, ref)]

    @classmethod
    def load(
        cls,
        model: ModelRef,
        *,
        layers: Sequence[int] | None = None,
        template_version: str,
        dtype: str = "float32",
        device: str = "cpu",
        max_tokens: int = 512,
    ) -> Self:
        """Load a causal language model, or only the text part of a vision-language model.

        `layers` are entries of hidden_states (None: 1..L); `dtype` is the compute type. Raises ThroughlineError where
        the model is missing or is not a decoder-only language model.
        """
        try:
            config = AutoConfig.from_pretrained(model.source, revision=model.hub_revision)
            tokenizer = AutoTokenizer.from_pretrained(model.source, revision=model.hub_revision)
        except (OSError, ValueError) as error:
            raise ThroughlineError(
                f"text encoder {model.id}: cannot be loaded from {model.source} ({first_line(error)})"
            ) from error
        text_model = _load_text_model(model, config, getattr(torch, dtype)).to(device)
        return cls(
            text_model.eval().requires_grad_(False),
            tokenizer,
            ref=model,
            layers=layers,
            template_version=template_version,
            max_tokens=max_tokens,
        )

    @property
    def model(self) -> Any:
        """The transformers decoder, without a language-model head."""
        return self._model

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    def tokenise(self, captions: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each caption in its template, truncated to `max_tokens` and never empty."""
        return [ids[: self.max_tokens] for ids in self._all_tokens(captions)]

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Return the number of tokens of each caption in its template, before truncation."""
        return [len(ids) for ids in self._all_tokens(captions)]

    def _all_tokens(self, captions: Sequence[str]) -> list[list[int]]:
        if not captions:
            return []
        texts = [apply_template(self.template_version, caption) for caption in captions]
        return [list(ids) or self._empty_text_ids for ids in self._tokenizer(texts)["input_ids"]]

    def encode(
        self, captions: Sequence[str], max_batch_tokens: int = 2048, *, keep_on_device: bool = False
    ) -> list[EncodedText]:
        """Return the encoded texts in order; "" gives the unconditional text. Applies the template.

        Hidden states are on the CPU, or with `keep_on_device` on the encoder's device.
        """
        encoded = dict(self.encode_by_length(captions, max_batch_tokens, keep_on_device=keep_on_device))
        return [encoded[index] for index in range(len(captions))]

    def encode_by_length(
        self, captions: Sequence[str], max_batch_tokens: int = 2048, *, keep_on_device: bool = False
    ) -> Iterator[tuple[int, EncodedText]]:
        """Yield (index, encoded text), shortest first, so that a batch has little padding.

        Batches depend only on the list. `max_batch_tokens` includes padding; a longer text is a batch of its own.
        """
        all_tokens = self._all_tokens(captions)
        tokens = [ids[: self.max_tokens] for ids in all_tokens]
        for batch in length_sorted_batches([len(ids) for ids in tokens], max_batch_tokens):
            hidden_states = self._run([tokens[index] for index in batch], keep_on_device=keep_on_device)
            for row, index in enumerate(batch):
                length = len(tokens[index])
                yield (
                    index,
                    EncodedText(
                        token_ids=torch.tensor(tokens[index], dtype=torch.int32),
                        hidden_states=hidden_states[:, row, :length].clone(),
                        was_truncated=len(all_tokens[index]) > length,
                    ),
                )

    @torch.inference_mode()
    def _run(self, tokens: list[list[int]], *, keep_on_device: bool) -> Tensor:
        """Return (L, batch, longest S, C); values past a text's end are meaningless."""
        longest = max(map(len, tokens))
        device = self._model.device
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in tokens], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in tokens], device=device)
        output = self._model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        stacked = torch.stack([output.hidden_states[layer].to(STORED_TYPE) for layer in self.layers])
        return stacked if keep_on_device else stacked.cpu()


def length_sorted_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Return indices in batches, shortest first, ties by index; a batch padded to its longest fits the bound."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _load_text_model(model: ModelRef, config: Any, dtype: torch.dtype) -> Any:
    text_config = config.get_text_config(decoder=True)
    # The language model of a vision-language checkpoint has this prefix; vision tower and head are not read.
    key_mapping = {r"^(model\.)?language_model\.(model\.)?": ""} if text_config is not config else None
    restore_logging = _silence_loading()
    try:
        loaded, report = AutoModel.from_pretrained(
            model.source,
            revision=model.hub_revision,
            config=text_config,
            dtype=dtype,
            key_mapping=key_mapping,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ThroughlineError(f"text encoder {model.id}: cannot be loaded ({first_line(error)})") from error
    finally:
        restore_logging()
    if report["missing_keys"]:
        raise ThroughlineError(
            f"text encoder {model.id}: {len(report['missing_keys'])} weights are missing from {model.source}, such as "
            f"{sorted(report['missing_keys'])[0]}; it is not a supported decoder-only language model"
        )
    if key_mapping is not None:
        # The language model is saved without the prefix; transformers would try to restore it, and fail.
        loaded._weight_conversions = []
    return loaded


def _silence_loading() -> Any:
    """Silence the report of unread weights, which is intended here; return the function that restores logging."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    return lambda: logging.set_verbosity(level)


def _edge_token(tokenizer: Any, ref: ModelRef) -> int:
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ThroughlineError(f"text encoder {ref.id}: its tokenizer has neither start nor end token")
