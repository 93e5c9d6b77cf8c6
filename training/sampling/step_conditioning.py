"""Keys and values of the prompts' texts at each step of a sampler.

Everything that depends on the text alone (fusion, projection, keys and values of every block) is computed once per
prompt; where gates follow the schedule, once per direction of their layer weights (`text_over_time`). The
unconditional text is computed once per schedule. Only gates that follow a time estimated from the latents need a
computation for each image and step.

Shapes: B images, P distinct prompts, S text tokens, T scheduled times, G key and value heads, E channels of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data.feature_source import text_lengths
from training.models.backbone import Backbone
from training.models.dit import DiT
from training.models.fusion import shift_gate_time
from training.models.kernels.ragged_texts import Prepared, stack_texts
from training.models.layers import KeysValues
from training.sampling.text_over_time import KeysValuesOverTime, TimeBasis, text_over_time, time_bases

_MAX_PROJECTED_VALUES = 2**30
"""Values of projected directions in memory at once, 2 GiB in bf16; above it, times are computed in groups."""


@dataclass
class TextBatch:
    """Prepared texts of P prompts, with a cache of their keys and values for every block."""

    prepared: Prepared
    """(K, P, S, C'), or P of (K, S_i, C')"""
    lengths: Tensor
    fixed: list[KeysValues] | None = None
    """(P, G, S, E), where they don't depend on time."""
    over_time: dict[tuple[float, ...], list[KeysValuesOverTime]] = field(default_factory=dict)
    """(P, G, S, E) by groups of gate times."""

    @classmethod
    def of(cls, texts: Sequence[Tensor], device: torch.device, dtype: torch.dtype = torch.float32) -> "TextBatch":
        """Make a batch of prepared texts (K, S_i, C'): stacked for an accelerator, one by one for a CPU."""
        lengths, _ = text_lengths(texts)
        stacks = device.type != "cpu" or dtype != torch.float32
        prepared = stack_texts(tuple(texts)).to(device, dtype) if stacks else tuple(texts)
        return cls(prepared, lengths.to(device))

    @property
    def num_texts(self) -> int:
        return len(self.lengths)

    def rows(self, indices: Tensor) -> Prepared:
        """Return prepared texts by index."""
        if isinstance(self.prepared, Tensor):
            return self.prepared[:, indices]
        return tuple(self.prepared[index] for index in indices.tolist())


class StepConditioning:
    """The keys and values that each step attends to: unconditional rows first, then each image's prompt."""

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
        """Image i has prompt `prompt_of[i]` and, with guidance, unconditional text `unconditional_of[i]`.

        `times` (T,) are the flow times of the steps; `gate_shift` applies Eq. 11 to the gates' time.
        """
        self._model, self._text, self._unconditional = model, text, unconditional
        self._prompt_of, self._unconditional_of = prompt_of, unconditional_of
        self._times, self._gate_shift = times, gate_shift
        self._gate_times = shift_gate_time(times) if gate_shift else times
        one_image_per_prompt = text.num_texts == len(prompt_of) and torch.equal(
            prompt_of, torch.arange(len(prompt_of), device=prompt_of.device)
        )
        self._rows = None if one_image_per_prompt else prompt_of
        self._folded = model.fold_text_projection() if model.text_depends_on_time else None
        self._fixed: list[KeysValues] | None = None
        self._group_size = len(times)
        self._groups: list[tuple[tuple[float, ...], list[TimeBasis]]] = []
        """Gate times that are computed together, with the bases of their layer weights."""
        follows_schedule = model.text_depends_on_time and not model.text_depends_on_latents
        self._gated = model if follows_schedule and isinstance(model, DiT) else None
        if self._gated is not None:
            self._group_times(self._gated)

    def _group_times(self, gated: DiT) -> None:
        """Put all times into one group, or as many as have no more directions than memory allows."""
        config, fusion = gated.config, gated.fusion
        num_tokens = sum(int(text.lengths.max()) * text.num_texts for text in (self._text, self._unconditional) if text)
        values_per_direction = config.num_blocks * num_tokens * 2 * config.num_kv_heads * config.head_dim
        max_directions = max(1, _MAX_PROJECTED_VALUES // values_per_direction)
        bases = time_bases(fusion, self._gate_times)
        self._groups = [(tuple(self._gate_times.tolist()), bases)]
        if max(len(basis.directions) for basis in bases) > max_directions:
            self._group_size = max_directions
            groups = self._gate_times.split(max_directions)
            self._groups = [(tuple(times.tolist()), time_bases(fusion, times)) for times in groups]

    def keys_values(self, step: int, x_t: Tensor) -> list[KeysValues]:
        """Return each block's keys and values, (B or 2 * B, G, S, E), for the step that starts from latents x_t."""
        if self._model.text_depends_on_latents:
            return self._per_image(step, x_t)
        if self._gated is not None:
            gated, (group, index) = self._gated, divmod(step, self._group_size)
            return self._both_branches(lambda text: [block.at(index) for block in self._over_time(gated, text, group)])
        if self._fixed is None:
            self._fixed = self._both_branches(self._at_any_time)
        return self._fixed

    def _both_branches(self, keys_values_of: Callable[[TextBatch], list[KeysValues]]) -> list[KeysValues]:
        conditional = keys_values_of(self._text)
        if self._unconditional is None:
            return [(_select(k, self._rows), _select(v, self._rows)) for k, v in conditional]
        return _concatenate(keys_values_of(self._unconditional), self._unconditional_of, conditional, self._rows)

    def _at_any_time(self, text: TextBatch) -> list[KeysValues]:
        if text.fixed is None:
            gate_t = self._gate_times[0].expand(text.num_texts)
            text.fixed = self._model.text_keys_values(text.prepared, gate_t, self._folded)
        return text.fixed

    def _over_time(self, gated: DiT, text: TextBatch, group: int) -> list[KeysValuesOverTime]:
        times, bases = self._groups[group]
        if times not in text.over_time:
            assert self._folded is not None
            if text is self._text:
                text.over_time.clear()  # earlier groups are done; only the unconditional text is reused later
            text.over_time[times] = text_over_time(gated, text.prepared, bases, self._folded)
        return text.over_time[times]

    def _per_image(self, step: int, x_t: Tensor) -> list[KeysValues]:
        """Keys and values at each image's own gate time (B,), which both branches share; nothing is cached."""
        gate_t = self._model.gate_time(x_t, self._times[step])
        gate_t = shift_gate_time(gate_t) if self._gate_shift else gate_t
        conditional = self._model.text_keys_values(self._text.rows(self._prompt_of), gate_t, self._folded)
        if self._unconditional is None:
            return conditional
        unconditional_rows = self._unconditional.rows(self._unconditional_of)
        unconditional = self._model.text_keys_values(unconditional_rows, gate_t, self._folded)
        return _concatenate(unconditional, None, conditional, None)


def _concatenate(
    first: Sequence[KeysValues], first_rows: Tensor | None, second: Sequence[KeysValues], second_rows: Tensor | None
) -> list[KeysValues]:
    """Concatenate rows of two batches of texts, zero-padding the shorter texts."""
    longest = max(first[0][0].shape[2], second[0][0].shape[2])

    def joined(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([_pad(_select(a, first_rows), longest), _pad(_select(b, second_rows), longest)])

    return [(joined(a[0], b[0]), joined(a[1], b[1])) for a, b in zip(first, second, strict=True)]


def _select(keys_or_values: Tensor, rows: Tensor | None) -> Tensor:
    """Return rows by index, all for None; a single row is expanded without a copy."""
    if rows is None:
        return keys_or_values
    if keys_or_values.shape[0] == 1:
        return keys_or_values.expand(len(rows), -1, -1, -1)
    return keys_or_values[rows]


def _pad(keys_or_values: Tensor, length: int) -> Tensor:
    missing = length - keys_or_values.shape[2]
    return F.pad(keys_or_values, (0, 0, 0, missing)) if missing else keys_or_values
