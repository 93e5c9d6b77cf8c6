"""Keys and values of the texts that images are drawn for, at each step of a sampler.

What depends on the text alone (fusion, projection, keys and values of every block) is computed once per prompt, or
once per prompt and scheduled time where the gate follows time; the unconditional text once per schedule. Only where
the gate follows a time read off the latents is it computed for each image and step.

Shapes: B images, P distinct prompts, S text tokens, T scheduled times, G key and value heads, E channels of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from training.dit import Backbone
from training.feature_source import text_lengths
from training.fusion import Prepared, shift_gate_time, stack_texts
from training.layers import KeysValues

_FUSED_VALUES = 2**24
"""How many values of fused text are made at once, of as many scheduled times as that is enough for."""


@dataclass
class TextBatch:
    """Prepared text of P prompts, and the keys and values made of it for every block, by time."""

    prepared: Prepared
    """(K, P, S, C'), or P of (K, S_i, C')"""
    lengths: Tensor
    made: dict[float, list[KeysValues]] = field(default_factory=dict)
    """(P, G, S, E) at gate times; at 0 where they don't depend on time."""

    @classmethod
    def of(cls, texts: Sequence[Tensor], device: torch.device, dtype: torch.dtype = torch.float32) -> "TextBatch":
        """Gather prepared texts (K, S_i, C'): stacked on an accelerator, left where they lie on a CPU."""
        lengths, _ = text_lengths(texts)
        together = device.type != "cpu" or dtype != torch.float32
        prepared = stack_texts(tuple(texts)).to(device, dtype) if together else tuple(texts)
        return cls(prepared, lengths.to(device))

    @property
    def num_texts(self) -> int:
        return len(self.lengths)

    def rows(self, numbers: Tensor) -> Prepared:
        """Prepared text by number."""
        if isinstance(self.prepared, Tensor):
            return self.prepared[:, numbers]
        return tuple(self.prepared[number] for number in numbers.tolist())

    def num_values(self) -> int:
        """How many values one row of all texts has."""
        if isinstance(self.prepared, Tensor):
            return self.prepared[0].numel()
        return sum(text[0].numel() for text in self.prepared)


class StepConditioning:
    """What the backbone's blocks attend to at each step: unconditional rows first, then each image's prompt."""

    def __init__(
        self,
        model: Backbone,
        text: TextBatch,
        unconditional: TextBatch | None,
        prompt_of: Tensor,
        unconditional_of: Tensor,
        times: Tensor,
        *,
        gate_shift: bool,
    ) -> None:
        """Image i has prompt `prompt_of[i]` and, where there is guidance, unconditional text `unconditional_of[i]`.

        `times` (T,) are the flow times of the steps; `gate_shift` applies Eq. 11 to what gates see of them.
        """
        self._model, self._text, self._unconditional = model, text, unconditional
        self._prompt_of, self._unconditional_of = prompt_of, unconditional_of
        self._times, self._gate_shift = times, gate_shift
        self._gate_times = shift_gate_time(times) if gate_shift else times
        each_once = text.num_texts == len(prompt_of) and torch.equal(
            prompt_of, torch.arange(len(prompt_of), device=prompt_of.device)
        )
        self._rows = None if each_once else prompt_of
        self._projections = model.text_projections() if model.text_depends_on_time else None
        self._at_all_times: list[KeysValues] | None = None

    def keys_values(self, step: int, x_t: Tensor) -> list[KeysValues]:
        """Keys and values of each block, (B or 2 * B, G, S, E), for the step that starts from latents x_t."""
        if self._model.text_depends_on_latents:
            return self._of_each_image(step, x_t)
        if self._model.text_depends_on_time:
            return self._at_time(step)
        if self._at_all_times is None:
            self._at_all_times = self._at_time(0)
        return self._at_all_times

    def _at_time(self, step: int) -> list[KeysValues]:
        time = self._make(self._text, step)
        conditional = self._text.made.pop(time)  # no other step has its time
        if self._unconditional is None:
            return [(_pick(k, self._rows), _pick(v, self._rows)) for k, v in conditional]
        of_none = self._unconditional.made[self._make(self._unconditional, step)]
        return _join(of_none, self._unconditional_of, conditional, self._rows)

    def _make(self, text: TextBatch, step: int) -> float:
        """See that `text.made` has this step's keys and values, made together with those of the next; return its key.

        Products of several times at once are larger, and read the prepared text and the weights once.
        """
        if not self._model.text_depends_on_time:
            if not text.made:
                gate_t = self._gate_times[0].expand(text.num_texts)
                text.made[0.0] = self._model.text_keys_values(text.prepared, gate_t, self._projections)
            return 0.0
        time = float(self._gate_times[step])
        if time not in text.made:
            fused_values = self._model.config.num_blocks * text.num_values()
            times = self._gate_times[step:][: max(1, _FUSED_VALUES // fused_values)]
            made = self._model.text_keys_values_at(text.prepared, times, self._projections)
            text.made.update(zip(times.tolist(), made, strict=True))
        return time

    def _of_each_image(self, step: int, x_t: Tensor) -> list[KeysValues]:
        """Keys and values at gate times (B,) of the images' own, nothing kept: no two images or steps have the same.

        Both branches of an image share its time.
        """
        gate_t = self._model.gate_time(x_t, self._times[step])
        gate_t = shift_gate_time(gate_t) if self._gate_shift else gate_t
        conditional = self._model.text_keys_values(self._text.rows(self._prompt_of), gate_t, self._projections)
        if self._unconditional is None:
            return conditional
        of_none = self._unconditional.rows(self._unconditional_of)
        without = self._model.text_keys_values(of_none, gate_t, self._projections)
        return _join(without, None, conditional, None)


def _join(
    first: Sequence[KeysValues], first_rows: Tensor | None, second: Sequence[KeysValues], second_rows: Tensor | None
) -> list[KeysValues]:
    """Lay rows of two batches of texts end to end, the shorter texts padded with zeros."""
    longest = max(first[0][0].shape[2], second[0][0].shape[2])

    def joined(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([_lengthen(_pick(a, first_rows), longest), _lengthen(_pick(b, second_rows), longest)])

    return [(joined(a[0], b[0]), joined(a[1], b[1])) for a, b in zip(first, second, strict=True)]


def _pick(keys_or_values: Tensor, rows: Tensor | None) -> Tensor:
    """Rows by number, None for all as they are; not copied where one is wanted again and again."""
    if rows is None:
        return keys_or_values
    if keys_or_values.shape[0] == 1:
        return keys_or_values.expand(len(rows), -1, -1, -1)
    return keys_or_values[rows]


def _lengthen(keys_or_values: Tensor, longest: int) -> Tensor:
    missing = longest - keys_or_values.shape[2]
    return F.pad(keys_or_values, (0, 0, 0, missing)) if missing else keys_or_values
