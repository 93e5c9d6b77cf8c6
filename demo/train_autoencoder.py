"""Trains the demo's autoencoder: diffusers' AutoencoderKL with 16 latent channels and f8, on JPEG-coded scenes.

Every batch is a pure function of (seed, step), so a killed run that is started again gives the same weights. The model
is small because the demo encodes and decodes hundreds of images on two CPU cores: almost all its weights are at 1/8 and
1/4 resolution, and it has no attention, which is costly at 256 px and useless on flat scenes.
"""

import argparse
import io
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from PIL import Image

from demo.scenes import render, sample_scene

BLOCK_OUT_CHANNELS = (16, 24, 48, 96)
"""0.11 s to decode a 256 px image on one AVX2 core; (32, 64, 96, 96) took 0.38 s, which the bar does not require."""
LATENT_CHANNELS = 16
IMAGE_SIZE_PX = 256
STATISTICS_SCENES = 64
"""Scenes for the latents' mean and standard deviation."""
TRAINING_NORM_EPSILON = 1e-6 * 2**20
"""See `build_model`."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderTraining:
    """Everything that determines the weights; equal configurations give equal files on one machine type."""

    seed: int = 0
    num_steps: int = 2400
    """About 0.35 s per step on one AVX2 core; 1500 steps reached 29.4 dB, 2220 reached 30.4 dB."""
    scenes_per_step: int = 4
    crops_per_scene: int = 2
    crop_size_px: int = 64
    """A multiple of 8. Random crops, because most of a scene is its background."""
    learning_rate: float = 0.02
    """Muon's, for the inner convolutions; decays linearly to 0."""
    adam_learning_rate: float = 1.5e-3
    """AdamW's, for norms, biases, and the first and last convolutions; decays likewise."""
    warmup_steps: int = 30
    kl_weight: float = 1e-4
    """Weight of the KL divergence per latent value, relative to L1 + MSE per pixel in [-1, 1]; enough to bound the
    latents, too little to collapse a channel."""
    ema_decay: float = 0.998


def build_model() -> AutoencoderKL:
    """Return the untrained autoencoder in its training form; `as_diffusers` turns it into what diffusers expects.

    The training form differs in the epsilon of its group norms, about 1 instead of 1e-6, so that they barely
    normalise small activations: on flat images a norm of small groups erases the colour to be reconstructed. After 40
    seconds on one core: 20.0 dB against 17.8 dB with the usual epsilon.
    """
    num_blocks = len(BLOCK_OUT_CHANNELS)
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * num_blocks,
        up_block_types=("UpDecoderBlock2D",) * num_blocks,
        block_out_channels=BLOCK_OUT_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=IMAGE_SIZE_PX,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = TRAINING_NORM_EPSILON
        elif isinstance(module, ResnetBlock2D):
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)
    for convolution in (model.quant_conv, model.post_quant_conv):
        torch.nn.init.dirac_(convolution.weight)
        torch.nn.init.zeros_(convolution.bias)
    # Start with a small posterior variance: at 1 the noise drowns the mean and the output is grey.
    torch.nn.init.constant_(model.quant_conv.bias[LATENT_CHANNELS:], -8.0)
    return model


@torch.no_grad()
def as_diffusers(model: AutoencoderKL) -> None:
    """Convert the training form to diffusers' own (group norm epsilon 1e-6) in place, without changing any output.

    A norm of s * x with epsilon 1e-6 equals a norm of x with epsilon 1e-6 / s**2. So all activations between norms are
    scaled by s = 2**-10, exactly: by weights and biases of layers with normalised input, by biases of the others.
    """
    scale = 2.0**-10
    after_norm = [model.encoder.conv_in, model.decoder.conv_in]
    between_norms: list[torch.nn.Conv2d] = []
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-6
        elif isinstance(module, ResnetBlock2D):
            after_norm += [module.conv1, module.conv2]
            between_norms += [module.conv_shortcut] if module.conv_shortcut is not None else []
        elif isinstance(module, Downsample2D | Upsample2D):
            between_norms.append(module.conv)
    for convolution in after_norm:
        convolution.weight *= scale
    for convolution in after_norm + between_norms:
        convolution.bias *= scale


class Optimizers:
    """Muon for the inner convolutions, AdamW for everything else.

    torch.optim.Muon takes matrices only, so each convolution's weight is given to it as a view: output channels by
    everything else. Here it reached in 40 seconds what Adam at its best rate did not in 60.
    """

    def __init__(self, model: AutoencoderKL, config: AutoencoderTraining) -> None:
        self._config = config
        inner: list[torch.nn.Parameter] = []
        outer: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            is_inner = parameter.ndim == 4 and "conv_in" not in name and "conv_out" not in name
            (inner if is_inner else outer).append(parameter)
        self._pairs = [(weight, torch.nn.Parameter(_as_matrix(weight.detach()))) for weight in inner]
        matrices = [matrix for _, matrix in self._pairs]
        self._muon = torch.optim.Muon(matrices, lr=config.learning_rate, weight_decay=0.0)
        self._adam = torch.optim.AdamW(outer, lr=config.adam_learning_rate, betas=(0.9, 0.99), weight_decay=0.0)

    def step(self, step: int) -> None:
        """Update the weights at the rates of `step` and clear the gradients."""
        factor = rate_factor(self._config, step)
        self._muon.param_groups[0]["lr"] = self._config.learning_rate * factor
        self._adam.param_groups[0]["lr"] = self._config.adam_learning_rate * factor
        for weight, matrix in self._pairs:
            assert weight.grad is not None
            matrix.grad = _as_matrix(weight.grad.contiguous(memory_format=torch.channels_last))
            weight.grad = None
        for optimizer in (self._muon, self._adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._muon.state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])


def _as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """Return a channels-last (O, I, H, W) tensor as a view (O, H * W * I); raises RuntimeError for another layout."""
    return weight.permute(0, 2, 3, 1).view(len(weight), -1)


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """Return RGB images of one size as float32 (B, 3, H, W) in [-1, 1]."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def jpeg_coded(image: Image.Image, quality: int) -> Image.Image:
    """Return `image` after JPEG coding; the shards contain JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def draw_batch(config: AutoencoderTraining, step: int) -> torch.Tensor:
    """Return the crops of `step`, float32 (B, 3, crop, crop) in [-1, 1]; depends only on (seed, step)."""
    rng = np.random.default_rng((config.seed, step))
    crops = []
    for _ in range(config.scenes_per_step):
        image = jpeg_coded(render(sample_scene(rng), size_px=IMAGE_SIZE_PX), quality=int(rng.integers(80, 97)))
        for _ in range(config.crops_per_scene):
            left, top = rng.integers(0, IMAGE_SIZE_PX - config.crop_size_px + 1, size=2).tolist()
            crop = image.crop((left, top, left + config.crop_size_px, top + config.crop_size_px))
            crops.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop)
    return to_tensor(crops)


def rate_factor(config: AutoencoderTraining, step: int) -> float:
    """Return the factor of the peak learning rate at `step`: linear warm-up, then linear decay."""
    return min((step + 1) / config.warmup_steps, 1.0 - step / config.num_steps)


def reconstruction_loss(reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return L1, which keeps edges sharp, plus weighted MSE, which determines PSNR."""
    difference = reconstruction - pixels
    return difference.abs().mean() + 4.0 * difference.square().mean()


@torch.inference_mode()
def normalise_latents(model: AutoencoderKL, images: torch.Tensor) -> None:
    """Give every latent channel the same mean and standard deviation, without changing any reconstruction.

    The two 1x1 quant convolutions absorb the affine map per channel; the mean and standard deviation over all channels
    become the config's shift_factor and scaling_factor, so that (z - shift_factor) * scaling_factor has mean 0 and
    standard deviation 1 in each channel. A generator then weights all 16 channels equally.
    """
    latents = torch.cat([model.encode(chunk).latent_dist.mode() for chunk in images.split(8)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    overall_mean, overall_std = latents.mean(), latents.std()
    scale = overall_std / std
    offset = overall_mean - mean * scale
    moments, post = model.quant_conv, model.post_quant_conv
    moments.weight[:LATENT_CHANNELS] *= scale[:, None, None, None]
    moments.bias[:LATENT_CHANNELS] = moments.bias[:LATENT_CHANNELS] * scale + offset
    moments.bias[LATENT_CHANNELS:] += 2.0 * scale.log()
    post.weight /= scale[None, :, None, None]
    post.bias -= (post.weight * offset[None, :, None, None]).sum(dim=(1, 2, 3))
    model.register_to_config(
        scaling_factor=round(1.0 / overall_std.item(), 5), shift_factor=round(overall_mean.item(), 5)
    )


def export(ema: dict[str, torch.Tensor], config: AutoencoderTraining, num_steps_done: int, out_dir: Path) -> None:
    """Write the averaged weights as a diffusers folder at `out_dir`, replacing an older one by renames."""
    model = build_model()
    model.load_state_dict(ema)
    model.eval()
    as_diffusers(model)
    rng = np.random.default_rng((config.seed, 1 << 32))
    images = [
        jpeg_coded(render(sample_scene(rng), size_px=IMAGE_SIZE_PX), quality=90) for _ in range(STATISTICS_SCENES)
    ]
    normalise_latents(model, to_tensor(images))
    staging = out_dir.with_name(f".{out_dir.name}.new")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    if (out_dir / "README.md").exists():
        shutil.copy2(out_dir / "README.md", staging / "README.md")
    (staging / "training.json").write_text(
        json.dumps({"config": asdict(config), "num_steps_done": num_steps_done}, indent=1, sort_keys=True) + "\n"
    )
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    retired = out_dir.with_name(f".{out_dir.name}.old")
    shutil.rmtree(retired, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(retired)
    staging.rename(out_dir)
    shutil.rmtree(retired, ignore_errors=True)


def save_checkpoint(path: Path, state: dict) -> None:
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def train(
    config: AutoencoderTraining,
    out_dir: Path,
    work_dir: Path,
    *,
    export_every_steps: int,
    checkpoint_every_steps: int = 100,
    device: str = "cpu",
) -> None:
    """Train to `config.num_steps`, resuming from ``work_dir/checkpoint.pt`` if it has the same configuration."""
    torch.manual_seed(config.seed)
    model = build_model().to(device, memory_format=torch.channels_last).train()
    optimizers = Optimizers(model, config)
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    work_dir.mkdir(parents=True, exist_ok=True)
    checkpoint, first_step = work_dir / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        if state["config"] != asdict(config):
            raise SystemExit(f"{checkpoint} belongs to another configuration; remove it or choose another --work-dir")
        model.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizers"])
        ema, first_step = state["ema"], state["step"]
    started = time.monotonic()
    for step in range(first_step, config.num_steps):
        pixels = draw_batch(config, step).to(device, memory_format=torch.channels_last)
        posterior = model.encode(pixels).latent_dist
        noise = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        reconstruction = model.decode(posterior.sample(generator=noise)).sample
        distortion = reconstruction_loss(reconstruction, pixels)
        loss = distortion + config.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(step)
        # The early, poor weights leave the average sooner than with a constant decay.
        decay = min(config.ema_decay, (1.0 + step) / (10.0 + step))
        for name, value in model.state_dict().items():
            ema[name].lerp_(value, 1.0 - decay)
        done = step + 1
        if done % 20 == 0:
            mse = (reconstruction.detach() - pixels).square().mean().item() / 4.0
            rate = (time.monotonic() - started) / (done - first_step)
            print(f"step {done} loss {loss.item():.4f} psnr {-10 * np.log10(mse):.2f} s/step {rate:.3f}", flush=True)
        if done % checkpoint_every_steps == 0 or done == config.num_steps:
            state = {"model": model.state_dict(), "ema": ema, "step": done, "config": asdict(config)}
            save_checkpoint(checkpoint, state | {"optimizers": optimizers.state_dict()})
        if done % export_every_steps == 0 or done == config.num_steps:
            export(ema, config, done, out_dir)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models" / "vae")
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoints; run again with it to resume")
    parser.add_argument("--steps", type=int, default=AutoencoderTraining.num_steps)
    parser.add_argument("--seed", type=int, default=AutoencoderTraining.seed)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--export-every", type=int, default=500, metavar="STEPS")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse_arguments()
    torch.set_num_threads(1)
    train(
        AutoencoderTraining(seed=options.seed, num_steps=options.steps),
        options.out,
        options.work_dir,
        export_every_steps=options.export_every,
        device=options.device,
    )
