"""`throughline generate`: images for a prompt from finished checkpoints, of one strategy or of several in a grid."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.cli.checkpoints import checkpoint_in, newest_checkpoint, parse_strategy, strategy_of
from orchestration.cli.options import add_profile_arguments, load_profile
from pipelines.core.atomic import write_bytes
from pipelines.core.errors import ThroughlineError

if TYPE_CHECKING:
    from PIL import Image

    from evaluation.config import SamplesConfig
    from orchestration.profiles.profile import Profile
    from pipelines.runner.outputs import StageOutput
    from training.config import Arm, SamplerConfig
    from training.sampling.sampler import Sampler

METADATA_KEY = "throughline"
ALL_STRATEGIES = "all"
_GAP_PX = 8
_LABEL_PX = 14
"""Font size of a grid's labels; the header is twice as high."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """The images to generate."""

    prompt: str
    out: Path
    """Ends in .png."""
    arms: "tuple[Arm, ...]" = ()
    profile_argument: str | None = None
    """How the user named the profile, for error messages."""
    checkpoint: Path | None = None
    """A checkpoint's folder; None selects the newest of each arm's strategy."""
    seed: int = 0
    num_images: int = 1
    """Images per arm, from sample index 0."""
    negative_prompt: str = ""
    """Guidance steers away from it; "" is the unconditional text of training."""
    size_px: int | None = None
    """Height and width; None is the training size."""


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `generate`."""
    add_profile_arguments(parser)
    parser.add_argument("prompt")
    parser.add_argument(
        "--strategy", action="append", default=[], metavar="NAME",
        help="depth_wise, time_wise+shift, ... or all; repeatable: several strategies give one grid",
    )  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="default: the strategy's newest")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="images per strategy")
    parser.add_argument("--steps", type=int, help="sampling steps; default: the profile's")
    parser.add_argument("--guidance-scale", type=float, help="default: the profile's")
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="text that guidance steers away from")
    parser.add_argument("--size", type=int, metavar="PX", help="height and width; default: the training size")


def run_generate(arguments: argparse.Namespace) -> int:
    """Generate the images and print their paths; return 0."""
    settings = {"num_steps": arguments.steps, "guidance_scale": arguments.guidance_scale}
    changes = [f"samples.sampler.{name}={value}" for name, value in settings.items() if value is not None]
    profile = load_profile(arguments.profile, [*arguments.changes, *changes])
    request = GenerationRequest(
        prompt=arguments.prompt,
        out=arguments.out,
        arms=parse_arms(arguments.strategy, profile),
        profile_argument=arguments.profile,
        checkpoint=arguments.checkpoint,
        seed=arguments.seed,
        num_images=arguments.num_images,
        negative_prompt=arguments.negative_prompt,
        size_px=arguments.size,
    )
    for path in generate(profile, request):
        print(path)
    return 0


def parse_arms(names: Sequence[str], profile: "Profile") -> "tuple[Arm, ...]":
    """Return the arms called `names`, such as ``time_wise+shift``; ``all`` is every strategy of the profile."""
    from training.config import SHIFT_SUFFIX, Arm

    arms: list[Arm] = []
    for name in names:
        if name == ALL_STRATEGIES:
            arms += [Arm(strategy=strategy) for strategy in profile.strategies]
            continue
        strategy = parse_strategy(name.removesuffix(SHIFT_SUFFIX))
        if name.endswith(SHIFT_SUFFIX) and not strategy.has_time_gate:
            raise ThroughlineError(f"{name}: the shift of Eq. 11 needs a time gate (time_wise or joint)")
        arms.append(Arm(strategy=strategy, gate_shift=name.endswith(SHIFT_SUFFIX)))
    return tuple(dict.fromkeys(arms))


def generate(profile: "Profile", request: GenerationRequest) -> list[Path]:
    """Generate and write the images; return the files in order.

    One arm gives one file, or ``<name>-<k>.png`` for several images; several arms give one grid with a column per arm.
    Noise depends only on (seed, prompt, sample index), so all arms start from the same noise, and an image equals the
    one that an evaluation with this seed samples. Raises ThroughlineError for a user error.
    """
    if request.num_images < 1:
        raise ThroughlineError(f"--num-images {request.num_images}: expected 1 or more")
    if request.out.suffix.lower() != ".png":
        raise ThroughlineError(f"--out {request.out}: images are written as PNG; choose a name that ends in .png")
    checkpoints = _checkpoints(profile, request)
    samples = profile.resolved(profile.samples)
    generator = _Generator(samples, request)
    columns = [generator.generate(arm, checkpoint) for arm, checkpoint in checkpoints]
    request.out.parent.mkdir(parents=True, exist_ok=True)
    if len(columns) > 1:
        names = [arm.name for arm, _ in checkpoints]
        cells = [generator.provenance(arm, checkpoint, 0) for arm, checkpoint in checkpoints]
        _write(request.out, _grid(columns, names, request.prompt), {"grid": cells, "num_images": request.num_images})
        return [request.out]
    (images,), ((arm, checkpoint),) = columns, checkpoints
    paths = [request.out]
    if len(images) > 1:
        paths = [request.out.with_stem(f"{request.out.stem}-{index}") for index in range(len(images))]
    for index, (path, image) in enumerate(zip(paths, images, strict=True)):
        _write(path, image, generator.provenance(arm, checkpoint, index))
    return paths


def _checkpoints(profile: "Profile", request: GenerationRequest) -> "list[tuple[Arm, StageOutput]]":
    """Return the checkpoint that each requested arm samples from."""
    from training.config import Arm

    if request.checkpoint is None:
        if not request.arms:
            raise ThroughlineError("name a strategy with --strategy (or `all`), or a folder with --checkpoint")
        return [(arm, newest_checkpoint(profile, arm.strategy, request.profile_argument)) for arm in request.arms]
    checkpoint = checkpoint_in(request.checkpoint)
    strategy = strategy_of(checkpoint)
    arms = request.arms or (Arm(strategy=strategy),)
    for arm in arms:
        if arm.strategy is not strategy:
            raise ThroughlineError(f"{request.checkpoint}: a checkpoint of {strategy.value}, not of {arm.name}")
    return [(arm, checkpoint) for arm in arms]


class _Generator:
    """Generates the requested images with one checkpoint after another; loads encoder and autoencoder once."""

    def __init__(self, samples: "SamplesConfig", request: GenerationRequest) -> None:
        import torch

        if samples.device == "cuda" and not torch.cuda.is_available():
            raise ThroughlineError(
                "the profile samples on cuda, which this machine does not have; add --set samples.device=cpu"
            )
        if samples.threads is not None:
            torch.set_num_threads(samples.threads)
        self._samples, self._request = samples, request
        self._encoders: dict[str, Any] = {}
        self._decoders: dict[str | None, Any] = {}

    def generate(self, arm: "Arm", checkpoint: "StageOutput") -> "list[Image.Image]":
        """Return the images of one arm."""
        from pipelines.core.progress import Progress

        request, settings = self._request, self._settings(arm)
        sampler = self._sampler(checkpoint)
        indices = range(request.num_images)
        num_batches = -(-request.num_images // settings.batch_size)
        with Progress(f"generate {arm.name}", num_batches * settings.num_steps, "steps") as progress:
            return sampler.generate(
                [request.prompt] * request.num_images, list(indices), request.seed, settings,
                on_step=lambda *_: progress.advance(),
            )  # fmt: skip

    def provenance(self, arm: "Arm", checkpoint: "StageOutput", sample_index: int) -> dict[str, Any]:
        """Return the models, prompt and settings of an image; holds no local path."""
        request, settings = self._request, self._settings(arm)
        return {
            "checkpoint": checkpoint.data_version,
            "arm": arm.name,
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": request.seed,
            "sample_index": sample_index,
            "size_px": request.size_px,
            "settings": settings.model_dump(mode="json"),
            "text_encoder": self._samples.text_encoder.revision,
            "autoencoder": self._samples.autoencoder.revision,
        }

    def _settings(self, arm: "Arm") -> "SamplerConfig":
        return self._samples.sampler.model_copy(update={"gate_shift": arm.gate_shift})

    def _sampler(self, checkpoint: "StageOutput") -> "Sampler":
        from training.data.feature_source import load_text_encoder
        from training.models.saved_model import check_models, read_conditioning
        from training.sampling.sampler import load_autoencoder, load_sampler

        samples, request = self._samples, self._request
        check_models(checkpoint, samples.text_encoder, samples.autoencoder)
        conditioning = read_conditioning(checkpoint)
        version, subfolder = conditioning.template_version, conditioning.autoencoder_subfolder
        if subfolder not in self._decoders:
            self._decoders[subfolder] = load_autoencoder(samples.autoencoder, samples.device, subfolder)
        if version not in self._encoders:
            self._encoders[version] = load_text_encoder(samples.text_encoder, version, samples.device)
            for name, text in (("prompt", request.prompt), ("negative prompt", request.negative_prompt)):
                _check_length(self._encoders[version], name, text)
        sampler = load_sampler(
            checkpoint, samples.text_encoder, samples.autoencoder, device=samples.device,
            encoder=self._encoders[version], decoder=self._decoders[subfolder],
        )  # fmt: skip
        saved = sampler.saved
        if request.size_px is not None:
            unit = self._decoders[subfolder].downscale * saved.config.patch_size
            if request.size_px < unit or request.size_px % unit:
                raise ThroughlineError(
                    f"--size {request.size_px}: expected a multiple of {unit} px (the autoencoder's "
                    f"{self._decoders[subfolder].downscale} times patches of {saved.config.patch_size}), such as "
                    f"{max(unit, request.size_px // unit * unit)}"
                )
            size = request.size_px // self._decoders[subfolder].downscale
            saved = replace(saved, config=saved.config.model_copy(update={"latent_size": size}))
        return replace(sampler, saved=saved, negative_prompt=request.negative_prompt)


def _check_length(encoder: Any, name: str, text: str) -> None:
    (num_tokens,) = encoder.count_tokens([text])
    if num_tokens > encoder.max_tokens:
        raise ThroughlineError(
            f"the {name} is {num_tokens} tokens long with its template, the text encoder's limit is "
            f"{encoder.max_tokens}; shorten it"
        )


def _write(path: Path, image: "Image.Image", metadata: dict[str, Any]) -> None:
    import io

    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False, sort_keys=True))
    stream = io.BytesIO()
    image.save(stream, "PNG", pnginfo=info)
    write_bytes(path, stream.getvalue())


def _grid(columns: "Sequence[Sequence[Image.Image]]", names: Sequence[str], title: str) -> "Image.Image":
    """Return one image with a column per name, under a title; a title too long for the width is cut."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = columns[0][0].size
    font, header = ImageFont.load_default(_LABEL_PX), 2 * _LABEL_PX
    size = (
        _GAP_PX + len(columns) * (width + _GAP_PX),
        _GAP_PX + 2 * header + len(columns[0]) * (height + _GAP_PX),
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP_PX, _GAP_PX), _fitted(title, font, size[0] - 2 * _GAP_PX), fill="black", font=font)
    for column, (images, name) in enumerate(zip(columns, names, strict=True)):
        left = _GAP_PX + column * (width + _GAP_PX)
        draw.text((left, _GAP_PX + header), _fitted(name, font, width), fill="black", font=font)
        for row, image in enumerate(images):
            sheet.paste(image, (left, _GAP_PX + 2 * header + row * (height + _GAP_PX)))
    return sheet


def _fitted(text: str, font: Any, width_px: int) -> str:
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text + "…") > width_px:
        text = text[:-1]
    return text + "…"
