"""Hidden states of captions that no stage stored: the encoder runs on what a batch draws."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipelines.dataset.samples import ShardSamples

if TYPE_CHECKING:
    from features.text_encoder import TextEncoder

_MAX_BATCH_TOKENS = 8192


class EncodedText:
    """Text features of one split, (L, S, C) each, on the device that they are encoded on."""

    def __init__(self, samples: ShardSamples, load_encoder: "Callable[[], TextEncoder]", device: torch.device) -> None:
        self._samples, self._load_encoder = samples, load_encoder
        self._batches = device.type != "cpu"
        """On a CPU every text is encoded by itself: rounding depends on batch mates, and a resumed run draws others."""
        self._waiting: dict[int, Tensor] = {}
        self.truncated: set[int] = set()
        """Samples whose captions were read here and cut, because they are longer than the encoder reads."""

    def ask_for(self, indices: Sequence[int]) -> None:
        """Say which samples are read next, so that an accelerator encodes them together."""
        if self._batches and indices:
            encoded = self._encode(list(dict.fromkeys(indices)))
            self._waiting.update(encoded)

    def hidden_states(self, index: int) -> Tensor:
        """Return (L, S, C) of a sample."""
        waiting = self._waiting.pop(index, None)
        return waiting if waiting is not None else self._encode([index])[index]

    def _encode(self, indices: Sequence[int]) -> dict[int, Tensor]:
        captions = [self._samples[index].caption for index in indices]
        encoded = self._load_encoder().encode(captions, _MAX_BATCH_TOKENS, keep_on_device=True)
        self.truncated.update(index for index, text in zip(indices, encoded, strict=True) if text.was_truncated)
        return {index: text.hidden_states for index, text in zip(indices, encoded, strict=True)}
