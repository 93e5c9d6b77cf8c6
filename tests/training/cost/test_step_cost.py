"""Operations of a training step, against torch's own counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.training.conftest import TINY_MODEL
from tests.training.models.test_dit import built
from training.config import Strategy
from training.cost.step_cost import training_flops


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("num_text_tokens", [5, 30])  # few enough for the equations' own order of products
def test_operations_are_three_times_those_of_the_forward_pass(strategy: Strategy, num_text_tokens: int) -> None:
    model, generator = built(strategy), torch.Generator().manual_seed(0)
    prepared = model.prepare_text(torch.randn(4, num_text_tokens, 48, generator=generator))[:, None]
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, torch.tensor([0.5]), prepared, torch.tensor([num_text_tokens]))
    assert training_flops(TINY_MODEL, strategy).total(1, num_text_tokens) == 3 * counter.get_total_flops()
