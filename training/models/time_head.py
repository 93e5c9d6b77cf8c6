"""The head that estimates the flow time from noisy latents, for gates that follow the latents instead of the schedule.

At t = 0 latents are white noise, at t = 1 smooth: moments of the latents and of their differences predict the time.
Shapes: B batch, C channels, h and w latent height and width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.models.layers import Projection

_FEATURES_PER_CHANNEL = 5
_WIDTH = 32
_FLOOR = 1e-4
"""Added to moments before their logarithm; latents are of unit scale."""


def latent_statistics(latents: Tensor) -> Tensor:
    """Mean and four log second moments of each channel: (B, C, h, w), h and w at least 4 -> (B, 5 * C), fp32.

    The moments are the variance, the mean squared difference of neighbours along each axis, and that difference at
    half the resolution.
    """
    x = latents.float()
    mean = x.mean((2, 3))
    half = F.avg_pool2d(x, 2)
    moments = [
        x.var((2, 3), correction=0),
        x.diff(dim=2).square().mean((2, 3)),
        x.diff(dim=3).square().mean((2, 3)),
        half.diff(dim=2).square().mean((2, 3)) + half.diff(dim=3).square().mean((2, 3)),
    ]
    return torch.cat([mean, *((moment + _FLOOR).log() for moment in moments)], dim=1)


class TimeHead(nn.Module):
    """Linear, SiLU, Linear on `latent_statistics`, to the logit of t, in fp32; 2,625 parameters for 16 channels."""

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.inner = Projection(_FEATURES_PER_CHANNEL * latent_channels, (_WIDTH,), bias=True)
        self.outer = Projection(_WIDTH, (1,), bias=True, zero=True)

    def forward(self, latents: Tensor) -> Tensor:
        """Logits of t (B,) at latents (B, C, h, w); no gradient flows into the latents."""
        with torch.autocast(latents.device.type, enabled=False):
            return self.outer(F.silu(self.inner(latent_statistics(latents.detach())))).squeeze(-1)


def time_losses(logits: Tensor, t: Tensor) -> Tensor:
    """KL divergence of Bernoulli(sigmoid(logit)) from Bernoulli(t), zero for an exact estimate: (B,) each, fp32."""
    entropy = -(torch.xlogy(t, t) + torch.xlogy(1 - t, 1 - t))
    return F.binary_cross_entropy_with_logits(logits.float(), t.float(), reduction="none") - entropy
