"""Where an estimate takes its inputs from: the profile, this machine's measurements, or the assumptions."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestration.cost.assumptions import Assumptions
from orchestration.cost.quantity import UNKNOWN, Basis, Figure, Input
from pipelines.core.config import ModelRef
from training.config import Strategy
from training.cost.flops import KNOWN_TEXT_ENCODERS
from training.cost.step_cost import peak_flops_by_name

if TYPE_CHECKING:
    from orchestration.profiles.profile import Profile

_SIZE_IN_NAME = re.compile(r"(?<![\w.])A?(\d+(?:\.\d+)?)([BM])(?![\w.])", re.I)
_UNITS = {"B": 1e9, "M": 1e6}


@dataclass(frozen=True)
class Measured:
    """One number that this machine gave: which assumption it stands for, and what was looked at."""

    value: float
    what: str


@dataclass(frozen=True)
class Facts:
    """What the profile implies and only a look elsewhere tells: nothing is loaded for an estimate itself."""

    parameters: Mapping[Strategy, int] = field(default_factory=dict)
    """Trained parameters, for the strategies that are to be estimated."""
    prompts: Mapping[str, int] = field(default_factory=dict)
    """Prompts by benchmark; one that is missing is not known."""
    local_parameters: Mapping[str, int] = field(default_factory=dict)
    """Parameters of models in local folders, by id."""


@dataclass(frozen=True)
class Inputs:
    """All inputs of one estimate, each handed out as a figure that says which it is."""

    profile: "Profile"
    assumptions: Assumptions
    chosen: frozenset[str] = frozenset()
    """Assumptions that the user set: they stand before measurements."""
    measured: Mapping[str, Measured] = field(default_factory=dict)
    facts: Facts = Facts()

    def of_profile(self, path: str) -> Figure:
        """Return a number of the profile, by its dotted path as ``--set`` takes it."""
        value: object = self.profile
        for name in path.split("."):
            value = value[name] if isinstance(value, Mapping) else getattr(value, name)
        assert isinstance(value, (int, float)), path
        return Figure(float(value), frozenset({Input(Basis.PROFILE, path)}))

    def implied(self, value: float, path: str) -> Figure:
        """Return a number that follows from a field of the profile."""
        return Figure(value, frozenset({Input(Basis.PROFILE, path)}))

    def assumed(self, name: str) -> Figure:
        """Return what the user set, else what was measured, else what is assumed; not known where that is None."""
        if name not in self.chosen and name in self.measured:
            return Figure(self.measured[name].value, frozenset({Input(Basis.MEASURED, name)}))
        value = getattr(self.assumptions, name)
        return UNKNOWN if value is None else Figure(float(value), frozenset({Input(Basis.ASSUMED, name)}))

    def derived(self, name: str, otherwise: Figure) -> Figure:
        """Return the assumption or its measurement where there is one, else what the others make of it."""
        found = self.assumed(name)
        return found if found.is_known else otherwise

    def gpu_flops(self) -> Figure:
        """Peak of one GPU."""
        found = self.assumed("gpu_flops")
        if found.is_known:
            return found
        peak = peak_flops_by_name(self.assumptions.gpu)
        assert peak is not None, "the assumptions are checked"
        return Figure(peak, frozenset({Input(Basis.ASSUMED, "gpu")}))

    def active_parameters(self, model: ModelRef) -> Figure:
        """Parameters that a token passes: counted in a local folder, or read off the name."""
        if model.id in self.facts.local_parameters:
            return self.implied(self.facts.local_parameters[model.id], f"model {model.id}")
        sizes = _SIZE_IN_NAME.findall(model.id)
        if not sizes:
            return UNKNOWN
        # Of mixtures of experts the name gives the whole first and what a token passes last: 235B-A22B.
        number, unit = sizes[-1]
        return self.implied(float(number) * _UNITS[unit.upper()], f"model {model.id}")

    def encoder_flops_per_token(self) -> Figure:
        """Operations of the text encoder for a token."""
        model = self.profile.text_encoder
        shape = KNOWN_TEXT_ENCODERS.get(model.id)
        if shape is not None:
            return self.implied(shape.flops(1), f"model {model.id}")
        return 2 * self.active_parameters(model)
