"""Measures the demo's autoencoder on unseen scenes and compares it with its bar."""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from demo.scenes import render, sample_scene
from demo.train_autoencoder import IMAGE_SIZE_PX, jpeg_coded, to_tensor

MIN_PSNR_DB = 27.0
MODEL_DIR = Path(__file__).parent / "models" / "vae"
_UNSEEN_SEED = 7_777_777
"""Training seeds its streams with (seed, step) pairs; a single number gives different ones."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderMetrics:
    """Figures over `num_scenes` scenes: decibels on 8-bit RGB, seconds per image on one thread."""

    num_scenes: int
    mean_psnr_db: float
    worst_psnr_db: float
    latent_mean: float
    """Mean of the scaled latents, which should be about 0."""
    latent_std: float
    """Standard deviation of the scaled latents, which should be about 1."""
    encode_seconds: float
    decode_seconds: float

    @property
    def passed(self) -> bool:
        return self.mean_psnr_db >= MIN_PSNR_DB


@torch.inference_mode()
def measure(model_dir: Path = MODEL_DIR, *, num_scenes: int = 64) -> AutoencoderMetrics:
    """Encode and decode unseen JPEG-coded scenes at 256 px, with the posterior's mean."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = AutoencoderKL.from_pretrained(model_dir, local_files_only=True).eval()
        rng = np.random.default_rng(_UNSEEN_SEED)
        psnrs, latents, encode_seconds, decode_seconds = [], [], 0.0, 0.0
        for _ in range(num_scenes):
            pixels = to_tensor([jpeg_coded(render(sample_scene(rng), size_px=IMAGE_SIZE_PX), quality=95)])
            started = time.process_time()
            latent = model.encode(pixels).latent_dist.mode()
            encoded = time.process_time()
            decoded = model.decode(latent).sample
            decode_seconds += time.process_time() - encoded
            encode_seconds += encoded - started
            psnrs.append(psnr_db(decoded, pixels))
            latents.append((latent - model.config.shift_factor) * model.config.scaling_factor)
    finally:
        torch.set_num_threads(num_threads)
    scaled = torch.cat(latents)
    return AutoencoderMetrics(
        num_scenes=num_scenes,
        mean_psnr_db=float(np.mean(psnrs)),
        worst_psnr_db=float(np.min(psnrs)),
        latent_mean=scaled.mean().item(),
        latent_std=scaled.std().item(),
        encode_seconds=encode_seconds / num_scenes,
        decode_seconds=decode_seconds / num_scenes,
    )


def psnr_db(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio of two images in [-1, 1], after rounding both to 8 bits."""
    eight_bit = [((image.clamp(-1, 1) + 1) * 127.5).round() for image in (actual, expected)]
    mse = (eight_bit[0] - eight_bit[1]).square().mean().item()
    return float("inf") if mse == 0 else 10 * float(np.log10(255**2 / mse))


def describe(metrics: AutoencoderMetrics) -> str:
    """Return one line for a terminal."""
    return (
        f"autoencoder: PSNR {metrics.mean_psnr_db:.2f} dB (worst {metrics.worst_psnr_db:.2f}) on {metrics.num_scenes} "
        f"unseen scenes at {IMAGE_SIZE_PX} px, bar {MIN_PSNR_DB:.0f}: {'passed' if metrics.passed else 'FAILED'}; "
        f"scaled latents {metrics.latent_mean:+.3f} +- {metrics.latent_std:.3f}; one core: "
        f"encode {metrics.encode_seconds:.3f} s, decode {metrics.decode_seconds:.3f} s per image"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--scenes", type=int, default=64)
    options = parser.parse_args()
    result = measure(options.model, num_scenes=options.scenes)
    print(describe(result))
    sys.exit(0 if result.passed else 1)
