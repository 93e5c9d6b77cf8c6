"""Parameter counts at paper scale, built on the meta device."""

import pytest

from training.config import ModelConfig, Strategy
from training.cost.params import count_parameter_groups, count_parameters

PAPER_COUNTS = {
    Strategy.PENULTIMATE: 2_246_693_952,
    Strategy.UNIFORM: 2_246_693_952,
    Strategy.STATIC: 2_246_693_988,
    Strategy.TIME_WISE: 2_246_778_468,
    Strategy.DEPTH_WISE: 2_246_694_816,
    Strategy.JOINT: 2_248_722_336,
    Strategy.FUSE_DIT: 1_711_646_784,
}


@pytest.mark.parametrize("strategy", Strategy)
def test_counts_at_paper_scale_are_exact(strategy: Strategy) -> None:
    assert count_parameters(ModelConfig(), strategy) == PAPER_COUNTS[strategy]


def test_adaln_adds_the_same_to_every_strategy() -> None:
    plain = ModelConfig(hidden_size=32, num_blocks=2, text_width=16, num_text_layers=9)
    adaln = plain.model_copy(update={"timestep_conditioning": "adaln"})
    added = {count_parameters(adaln, strategy) - count_parameters(plain, strategy) for strategy in Strategy}
    inner, outer, modulations, tables = 256 * 32 + 32, 32 * 32 + 32, 32 * 8 * 32 + 8 * 32, 2 * 6 * 32
    assert added == {inner + outer + modulations + tables}
    assert {count_parameter_groups(adaln, strategy).adaln for strategy in Strategy} == added
    assert {count_parameter_groups(plain, strategy).adaln for strategy in Strategy} == {0}
