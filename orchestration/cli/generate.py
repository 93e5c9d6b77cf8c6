"""`throughline generate`: images of a prompt from finished checkpoints, of one strategy or of several side by side."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.config import SamplesConfig
from orchestration.cli.checkpoints import checkpoint_in, newest_checkpoint, parse_strategy, strategy_of
from pipelines.core.atomic import write_bytes
from pipelines.core.errors import ThroughlineError
from pipelines.core.progress import Progress
from pipelines.runner.outputs import StageOutput
from training.config import SHIFT_SUFFIX, Arm, SamplerConfig

if TYPE_CHECKING:
    from PIL import Image

    from orchestration.profiles.profile import Profile
    from training.sampling.sampler import Sampler

METADATA_KEY = "throughline"
ALL_STRATEGIES = "all"
_GAP_PX = 8
_LABEL_PX = 14
"""Of the letters under a grid's head; the head is twice as high."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What is to be drawn."""

    prompt: str
    out: Path
    """Its suffix is .png."""
    arms: tuple[Arm, ...] = ()
    profile_argument: str | None = None
    """How the user named the profile, for advice."""
    checkpoint: Path | None = None
    """A checkpoint's folder; None takes the newest of each arm's strategy."""
    seed: int = 0
    num_images: int = 1
    """Images per arm, from sample index 0."""
    negative_prompt: str = ""
    """Guidance leads away from it; "" is the unconditional text of training."""
    size_px: int | None = None
    """Height and width; None is the size of training."""


def parse_arms(names: Sequence[str], profile: "Profile") -> tuple[Arm, ...]:
    """Return the arms called `names`, such as ``time_wise+shift``; ``all`` is every strategy of the profile."""
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
    """Draw and write the images; return the files in order.

    One arm gives one file, or ``<name>-<k>.png`` where several images were asked for; several arms give one grid, an
    arm to a column. Noise depends on (seed, prompt, sample index) alone, so arms start from the same, and an image is
    the one that an evaluation with this seed draws. Raises ThroughlineError for what the user can mend.
    """
    if request.num_images < 1:
        raise ThroughlineError(f"{request.num_images} images were asked for; ask for 1 or more")
    if request.out.suffix.lower() != ".png":
        raise ThroughlineError(f"--out {request.out}: images are written as PNG; give it a name that ends in .png")
    checkpoints = _checkpoints(profile, request)
    samples = profile.resolved(profile.samples)
    artist = _Artist(samples, request)
    drawn = [artist.draw(arm, checkpoint) for arm, checkpoint in checkpoints]
    request.out.parent.mkdir(parents=True, exist_ok=True)
    if len(drawn) > 1:
        names = [arm.name for arm, _ in checkpoints]
        facts = [artist.facts(arm, checkpoint, 0) for arm, checkpoint in checkpoints]
        _write(request.out, _grid(drawn, names, request.prompt), {"grid": facts, "num_images": request.num_images})
        return [request.out]
    (images,), ((arm, checkpoint),) = drawn, checkpoints
    paths = [request.out]
    if len(images) > 1:
        paths = [request.out.with_stem(f"{request.out.stem}-{index}") for index in range(len(images))]
    for index, (path, image) in enumerate(zip(paths, images, strict=True)):
        _write(path, image, artist.facts(arm, checkpoint, index))
    return paths


def _checkpoints(profile: "Profile", request: GenerationRequest) -> list[tuple[Arm, StageOutput]]:
    if request.checkpoint is None:
        if not request.arms:
            raise ThroughlineError("name a strategy with --strategy (or `all` of them), or a folder with --checkpoint")
        return [(arm, newest_checkpoint(profile, arm.strategy, request.profile_argument)) for arm in request.arms]
    checkpoint = checkpoint_in(request.checkpoint)
    strategy = strategy_of(checkpoint)
    arms = request.arms or (Arm(strategy=strategy),)
    for arm in arms:
        if arm.strategy is not strategy:
            raise ThroughlineError(f"{request.checkpoint}: a checkpoint of {strategy.value}, not of {arm.name}")
    return [(arm, checkpoint) for arm in arms]


class _Artist:
    """Draws the requested images with one checkpoint after the other, encoder and autoencoder loaded once."""

    def __init__(self, samples: SamplesConfig, request: GenerationRequest) -> None:
        import torch

        if samples.device == "cuda" and not torch.cuda.is_available():
            raise ThroughlineError(
                "the profile samples on cuda, and this machine has none; add --set samples.device=cpu"
            )
        if samples.threads is not None:
            torch.set_num_threads(samples.threads)
        self._samples, self._request = samples, request
        self._encoders: dict[str, Any] = {}
        self._decoders: dict[str | None, Any] = {}

    def draw(self, arm: Arm, checkpoint: StageOutput) -> "list[Image.Image]":
        """Return the images of one arm."""
        request, settings = self._request, self._settings(arm)
        sampler = self._sampler(checkpoint)
        indices = range(request.num_images)
        num_batches = -(-request.num_images // settings.batch_size)
        with Progress(f"generate {arm.name}", num_batches * settings.num_steps, "steps") as progress:
            return sampler.generate(
                [request.prompt] * request.num_images, list(indices), request.seed, settings,
                on_step=lambda *_: progress.advance(),
            )  # fmt: skip

    def facts(self, arm: Arm, checkpoint: StageOutput, sample_index: int) -> dict[str, Any]:
        """Return what an image was drawn from, without a path."""
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

    def _settings(self, arm: Arm) -> SamplerConfig:
        return self._samples.sampler.model_copy(update={"gate_shift": arm.gate_shift})

    def _sampler(self, checkpoint: StageOutput) -> "Sampler":
        from training.data.feature_source import load_text_encoder
        from training.models.saved_model import check_models, read_conditioning
        from training.sampling.sampler import load_autoencoder, load_sampler

        samples, request = self._samples, self._request
        check_models(checkpoint, samples.text_encoder, samples.autoencoder)
        made_with = read_conditioning(checkpoint)
        version, subfolder = made_with.template_version, made_with.autoencoder_subfolder
        if subfolder not in self._decoders:
            self._decoders[subfolder] = load_autoencoder(samples.autoencoder, samples.device, subfolder)
        if version not in self._encoders:
            self._encoders[version] = load_text_encoder(samples.text_encoder, version, samples.device)
            for what, text in (("prompt", request.prompt), ("negative prompt", request.negative_prompt)):
                _check_length(self._encoders[version], what, text)
        sampler = load_sampler(
            checkpoint, samples.text_encoder, samples.autoencoder, device=samples.device,
            encoder=self._encoders[version], decoder=self._decoders[subfolder],
        )  # fmt: skip
        saved = sampler.saved
        if request.size_px is not None:
            unit = self._decoders[subfolder].downscale * saved.config.patch_size
            if request.size_px < unit or request.size_px % unit:
                raise ThroughlineError(
                    f"{request.size_px} px: sides are multiples of {unit} (the autoencoder's "
                    f"{self._decoders[subfolder].downscale} times patches of {saved.config.patch_size}); "
                    f"take {max(unit, request.size_px // unit * unit)}"
                )
            size = request.size_px // self._decoders[subfolder].downscale
            saved = replace(saved, config=saved.config.model_copy(update={"latent_size": size}))
        return replace(sampler, saved=saved, negative_prompt=request.negative_prompt)


def _check_length(encoder: Any, what: str, text: str) -> None:
    (num_tokens,) = encoder.count_tokens([text])
    if num_tokens > encoder.max_tokens:
        raise ThroughlineError(
            f"the {what} is {num_tokens} tokens long in its template, the text encoder reads {encoder.max_tokens}; "
            "shorten it"
        )


def _write(path: Path, image: "Image.Image", facts: dict[str, Any]) -> None:
    import io

    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(facts, ensure_ascii=False, sort_keys=True))
    stream = io.BytesIO()
    image.save(stream, "PNG", pnginfo=info)
    write_bytes(path, stream.getvalue())


def _grid(columns: "Sequence[Sequence[Image.Image]]", names: Sequence[str], title: str) -> "Image.Image":
    """Return images in columns under their names, the title above; a title too long for the width is cut."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = columns[0][0].size
    font, head = ImageFont.load_default(_LABEL_PX), 2 * _LABEL_PX
    size = (
        _GAP_PX + len(columns) * (width + _GAP_PX),
        _GAP_PX + 2 * head + len(columns[0]) * (height + _GAP_PX),
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP_PX, _GAP_PX), _fitted(title, font, size[0] - 2 * _GAP_PX), fill="black", font=font)
    for column, (images, name) in enumerate(zip(columns, names, strict=True)):
        left = _GAP_PX + column * (width + _GAP_PX)
        draw.text((left, _GAP_PX + head), _fitted(name, font, width), fill="black", font=font)
        for row, image in enumerate(images):
            sheet.paste(image, (left, _GAP_PX + 2 * head + row * (height + _GAP_PX)))
    return sheet


def _fitted(text: str, font: Any, width_px: int) -> str:
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text + "…") > width_px:
        text = text[:-1]
    return text + "…"
