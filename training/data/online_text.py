"""Hidden states of captions without stored features: the encoder runs on the captions of each batch."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipelines.dataset.samples import ShardSamples

if TYPE_CHECKING:
    from features.text_encoder import TextEncoder

_MAX_BATCH_TOKENS = 8192


class OnlineText:
    """Text features of one split, (L, S, C) each, on the device of their encoder."""

    def __init__(self, samples: ShardSamples, load_encoder: "Callable[[], TextEncoder]", device: torch.device) -> None:
        self._samples, self._load_encoder = samples, load_encoder
        self._encodes_in_batches = device.type != "cpu"
        """A CPU encodes each text alone: rounding depends on the batch, and a resumed run has other batches."""
        self._prefetched: dict[int, Tensor] = {}
        self.truncated: set[int] = set()
        """Samples whose captions were encoded here and are longer than the encoder reads."""

    def prefetch(self, indices: Sequence[int]) -> None:
        """Encode the samples that are read next, together on an accelerator."""
        if self._encodes_in_batches and indices:
            self._prefetched.update(self._encode(list(dict.fromkeys(indices))))

    def hidden_states(self, index: int) -> Tensor:
        """Return (L, S, C) of a sample."""
        prefetched = self._prefetched.pop(index, None)
        return prefetched if prefetched is not None else self._encode([index])[index]

    def _encode(self, indices: Sequence[int]) -> dict[int, Tensor]:
        captions = [self._samples[index].caption for index in indices]
        encoded = self._load_encoder().encode(captions, _MAX_BATCH_TOKENS, keep_on_device=True)
        self.truncated.update(index for index, text in zip(indices, encoded, strict=True) if text.was_truncated)
        return {index: text.hidden_states for index, text in zip(indices, encoded, strict=True)}
