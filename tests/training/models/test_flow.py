"""Random draws, flow matching, and the conversion to diffusers' conventions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.models.flow import (
    interpolate,
    logit_normal_time,
    sample_losses,
    sampling_noise,
    shift_time,
    training_draw,
    validation_noise,
    velocity_target,
)
from training.sampling.schedule import build_scheduler, euler_step, flow_time

SHAPE = (2, 3, 3)


def test_time_runs_from_noise_to_data() -> None:
    noise, data = torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1)
    assert interpolate(noise, data, torch.tensor([0.0, 1.0])).flatten().tolist() == [0.0, 1.0]
    assert velocity_target(noise, data).flatten().tolist() == [1.0, 1.0]


def test_sigma_and_timesteps_mirror_flow_time() -> None:
    scheduler = build_scheduler(4, 1.0)
    assert scheduler.sigmas.tolist() == pytest.approx([1.0, 0.667, 0.334, 0.001, 0.0], abs=1e-3)
    t = flow_time(scheduler.timesteps)
    torch.testing.assert_close(t, 1 - scheduler.sigmas[:-1])
    assert t[0] == 0
    assert (t.diff() > 0).all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_steps_along_a_straight_path_arrive_at_the_data(shift: float) -> None:
    noise, data = torch.randn(1, *SHAPE), torch.randn(1, *SHAPE)
    scheduler, x_t = build_scheduler(5, shift), noise
    for timestep in scheduler.timesteps:
        torch.testing.assert_close(x_t, interpolate(noise, data, flow_time(timestep)[None]), atol=1e-5, rtol=1e-5)
        x_t = euler_step(scheduler, x_t, velocity_target(noise, data), timestep)
    torch.testing.assert_close(x_t, data, atol=1e-5, rtol=1e-5)


def test_the_time_shift_is_the_schedulers() -> None:
    plain, shifted = build_scheduler(7, 1.0), build_scheduler(7, 3.0)
    sigma = plain.sigmas[:-1]
    torch.testing.assert_close(shift_time(1 - sigma, 3.0), 1 - 3.0 * sigma / (1 + 2.0 * sigma))
    assert (shift_time(torch.tensor([0.5]), 3.0) < 0.5).all()  # more weight on noisy times
    # diffusers applies the shift to its last sigma twice, so the last times differ a little from shifting plain ones.
    expected = flow_time(shifted.timesteps)
    torch.testing.assert_close(shift_time(flow_time(plain.timesteps), 3.0), expected, atol=1e-2, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9), step=st.integers(0, 10**6), position=st.integers(0, 4096))
def test_a_draw_depends_only_on_seed_step_and_position(seed: int, step: int, position: int) -> None:
    first, second = (training_draw(seed, step, position, SHAPE, 0.1) for _ in range(2))
    np.testing.assert_array_equal(first.noise, second.noise)
    np.testing.assert_array_equal(first.posterior_noise, second.posterior_noise)
    assert (first.time_normal, first.drops_prompt) == (second.time_normal, second.drops_prompt)
    for words in ((seed + 1, step, position), (seed, step + 1, position), (seed, step, position + 1)):
        other = training_draw(*words, SHAPE, 0.1)
        assert not np.array_equal(first.noise, other.noise)
        assert first.time_normal != other.time_normal


def test_draws_have_the_stated_distributions() -> None:
    draws = [training_draw(0, 5, position, (4, 8, 8), 0.1) for position in range(2000)]
    normals = torch.tensor([draw.time_normal for draw in draws])
    assert abs(float(normals.mean())) < 0.1
    assert float(normals.std()) == pytest.approx(1, abs=0.1)
    assert np.mean([draw.drops_prompt for draw in draws]) == pytest.approx(0.1, abs=0.03)
    noise = np.stack([draw.noise for draw in draws])
    posterior = np.stack([draw.posterior_noise for draw in draws])
    assert noise.std() == pytest.approx(1, abs=0.01)
    assert abs(np.corrcoef(noise.ravel(), posterior.ravel())[0, 1]) < 0.01
    t = logit_normal_time(normals, 0.0, 1.0, 1.0)
    assert ((t > 0) & (t < 1)).all()
    assert float(t.median()) == pytest.approx(0.5, abs=0.03)
    assert float(t.logit().mean()) == pytest.approx(float(normals.mean()), abs=1e-4)


def test_prompt_drop_of_zero_drops_nothing() -> None:
    assert not any(training_draw(0, 0, position, SHAPE, 0.0).drops_prompt for position in range(100))


def test_noise_of_a_sample_depends_on_seed_prompt_and_index() -> None:
    noise = [
        sampling_noise(seed, prompt, index, SHAPE)
        for seed, prompt, index in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a", 0))
    ]
    assert torch.equal(noise[0], noise[4])
    assert all(not torch.equal(noise[0], other) for other in noise[1:4])
    assert not np.array_equal(validation_noise("00", SHAPE), validation_noise("01", SHAPE))


def test_losses_are_means_per_sample() -> None:
    predicted, target = torch.zeros(2, *SHAPE), torch.zeros(2, *SHAPE)
    predicted[1, 0, 0, 0] = 3.0
    assert sample_losses(predicted, target).tolist() == pytest.approx([0.0, 9 / math.prod(SHAPE)])
