"""Flow matching: the random draws of a training sample, the point x_t, the target, the loss.

Shapes: B batch, C channels, h and w latent height and width. Time: t = 0 is noise, t = 1 is data.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Draw:
    """The random numbers of one training sample, the same for every strategy."""

    drops_prompt: bool
    time_normal: float
    """The N(0, 1) behind a logit-normal time."""
    posterior_noise: np.ndarray
    """(C, h, w) fp32, of the autoencoder's posterior."""
    noise: np.ndarray
    """(C, h, w) fp32, x at t = 0."""


def _generator(*words: object) -> np.random.Generator:
    digest = hashlib.blake2b(":".join(map(str, words)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def training_draw(seed: int, step: int, position: int, shape: Sequence[int], prompt_drop: float) -> Draw:
    """Return the draw at one position of the global batch: a function of (seed, step, position), not of the process."""
    generator = _generator("training", seed, step, position)
    return Draw(
        drops_prompt=bool(generator.random() < prompt_drop),
        time_normal=float(generator.standard_normal()),
        posterior_noise=generator.standard_normal(shape, dtype=np.float32),
        noise=generator.standard_normal(shape, dtype=np.float32),
    )


def validation_noise(sample_key: str, shape: Sequence[int]) -> np.ndarray:
    """Return the fixed noise (C, h, w) of a held-out sample, the same for every run and step."""
    return _generator("validation", sample_key).standard_normal(shape, dtype=np.float32)


def sampling_noise(seed: int, prompt: str, sample_index: int, shape: Sequence[int]) -> Tensor:
    """Return the latents (C, h, w) that a sample starts from, fp32."""
    values = _generator("sampling", seed, sample_index, prompt).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(values)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Static shift of the noise schedule, sigma' = shift * sigma / (1 + (shift - 1) * sigma), in t = 1 - sigma."""
    return t / (t + shift * (1 - t))


def logit_normal_time(time_normal: Tensor, mean: float, std: float, shift: float) -> Tensor:
    """Return t = sigmoid(mean + std * normal) with the static shift applied; (B,) -> (B,) in (0, 1)."""
    return shift_time(torch.sigmoid(mean + std * time_normal), shift)


def interpolate(noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) * noise + t * data: (B, C, h, w) each, t (B,)."""
    t = t[:, None, None, None]
    return (1 - t) * noise + t * data


def velocity_target(noise: Tensor, data: Tensor) -> Tensor:
    """d x_t / d t = data - noise."""
    return data - noise


def sample_losses(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample in fp32: (B, C, h, w) -> (B,)."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)
