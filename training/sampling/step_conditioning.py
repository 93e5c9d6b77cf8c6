"""Keys and values of the texts that images are drawn for, at each step of a sampler.

What depends on the text alone (fusion, projection, keys and values of every block) is computed once per prompt, and
where gates follow time, once for each of the few directions that layer weights at all scheduled times are made of
(`text_over_time`); the unconditional text once per schedule. Only where the gate follows a time read off the latents is
it computed for each image and step.

Shapes: B images, P distinct prompts, S text tokens, T scheduled times, G key and value heads, E channels of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data.feature_source import text_lengths
from training.models.dit import Backbone, DiT
from training.models.fusion import Prepared, shift_gate_time, stack_texts
from training.models.layers import KeysValues
from training.sampling.text_over_time import KeysValuesOverTime, TimeBasis

_KEPT_VALUES = 2**30
"""How many values of projected directions are kept at once, 2 GiB in bf16; beyond, some times after others."""


@dataclass
class TextBatch:
    """Prepared text of P prompts, and what was made of it for every block."""

    prepared: Prepared
    """(K, P, S, C'), or P of (K, S_i, C')"""
    lengths: Tensor
    fixed: list[KeysValues] | None = None
    """(P, G, S, E), where they don't depend on time."""
    over_time: dict[tuple[float, ...], list[KeysValuesOverTime]] = field(default_factory=dict)
    """(P, G, S, E) at each of some gate times."""

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
        self._fixed: list[KeysValues] | None = None
        self._times_at_once = len(times)
        self._groups: list[tuple[tuple[float, ...], list[TimeBasis]]] = []
        """Times that are made together, and what layer weights at them are made of."""
        follows_schedule = model.text_depends_on_time and not model.text_depends_on_latents
        self._gated = model if follows_schedule and isinstance(model, DiT) else None
        if self._gated is not None:
            self._group_times(self._gated)

    def _group_times(self, gated: DiT) -> None:
        """Take all times at once, or as many as have no more directions than may be kept."""
        config, time_bases = gated.config, gated.fusion.time_bases
        tokens = sum(int(text.lengths.max()) * text.num_texts for text in (self._text, self._unconditional) if text)
        kept_values = config.num_blocks * tokens * 2 * config.num_kv_heads * config.head_dim
        most = max(1, _KEPT_VALUES // kept_values)
        bases = time_bases(self._gate_times)
        self._groups = [(tuple(self._gate_times.tolist()), bases)]
        if max(len(basis.directions) for basis in bases) > most:
            self._times_at_once = most
            self._groups = [(tuple(times.tolist()), time_bases(times)) for times in self._gate_times.split(most)]

    def keys_values(self, step: int, x_t: Tensor) -> list[KeysValues]:
        """Keys and values of each block, (B or 2 * B, G, S, E), for the step that starts from latents x_t."""
        if self._model.text_depends_on_latents:
            return self._of_each_image(step, x_t)
        if self._gated is not None:
            gated, (group, place) = self._gated, divmod(step, self._times_at_once)
            return self._joined(lambda text: [block.at(place) for block in self._over_time(gated, text, group)])
        if self._fixed is None:
            self._fixed = self._joined(self._at_any_time)
        return self._fixed

    def _joined(self, keys_values_of: Callable[[TextBatch], list[KeysValues]]) -> list[KeysValues]:
        conditional = keys_values_of(self._text)
        if self._unconditional is None:
            return [(_pick(k, self._rows), _pick(v, self._rows)) for k, v in conditional]
        return _join(keys_values_of(self._unconditional), self._unconditional_of, conditional, self._rows)

    def _at_any_time(self, text: TextBatch) -> list[KeysValues]:
        if text.fixed is None:
            gate_t = self._gate_times[0].expand(text.num_texts)
            text.fixed = self._model.text_keys_values(text.prepared, gate_t, self._projections)
        return text.fixed

    def _over_time(self, gated: DiT, text: TextBatch, group: int) -> list[KeysValuesOverTime]:
        times, bases = self._groups[group]
        if times not in text.over_time:
            assert self._projections is not None
            if text is self._text:
                text.over_time.clear()  # times go on; those of the unconditional text come again in the next batch
            text.over_time[times] = gated.text_over_time(text.prepared, bases, self._projections)
        return text.over_time[times]

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
