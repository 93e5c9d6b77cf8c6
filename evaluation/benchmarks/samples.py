"""Stage `samples`: the images of one arm for the prompts of one benchmark."""

import hashlib
import io
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from evaluation.benchmarks.cost import samples_cost
from evaluation.benchmarks.prompt_files import EvaluationPrompt
from evaluation.benchmarks.prompt_sets import read_prompts
from evaluation.config import SamplesConfig, parse_partition
from pipelines.core.config import ModelRef
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import Inputs, StageOutput
from pipelines.runner.preview import NUM_IMAGES, thumbnail
from pipelines.runner.rows import DERIVED
from pipelines.runner.stage import Stage
from pipelines.runner.units import FinishedUnit, StageResult, StageRun
from training.config import Arm, SamplerConfig

if TYPE_CHECKING:
    from PIL import Image

    from training.sampling.sampler import Sampler

logger = logging.getLogger(__name__)


def png_bytes(image: "Image.Image") -> bytes:
    """Return the image as PNG without metadata, so that equal pixels give equal bytes."""
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "PNG", compress_level=6)
    return stream.getvalue()


class _CachingEncoder:
    """A text encoder that encodes each prompt once per process, one at a time.

    Rounding depends on the other texts of a batch. Encoded alone, a prompt has the same hidden states whatever other
    arms, or the same run before it was killed, encoded earlier.
    """

    def __init__(self, encoder: Any, max_num_bytes: int) -> None:
        self._encoder = encoder
        self.max_tokens: int = encoder.max_tokens
        self.truncated: set[str] = set()
        """Texts that were longer than `max_tokens`."""
        self._num_bytes_left = max_num_bytes
        self._cache: dict[str, Any] = {}

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Return the encoded texts, in order."""
        return [self._encode_one(text) for text in texts]

    def _encode_one(self, text: str) -> Any:
        if text in self._cache:
            return self._cache[text]
        (encoded,) = self._encoder.encode([text])
        if encoded.was_truncated:
            self.truncated.add(text)
        num_bytes = encoded.hidden_states.numel() * encoded.hidden_states.element_size()
        if num_bytes <= self._num_bytes_left:
            self._num_bytes_left -= num_bytes
            self._cache[text] = encoded
        return encoded


@lru_cache(maxsize=1)
def _text_encoder(model: ModelRef, template_version: str, device: str, max_num_bytes: int) -> _CachingEncoder:
    from training.data.feature_source import load_text_encoder

    return _CachingEncoder(load_text_encoder(model, template_version, device), max_num_bytes)


@lru_cache(maxsize=1)
def _autoencoder(model: ModelRef, device: str, subfolder: str | None) -> Any:
    from training.sampling.sampler import load_autoencoder

    return load_autoencoder(model, device, subfolder)


def _load_sampler(checkpoint: StageOutput, config: SamplesConfig) -> "tuple[Sampler, _CachingEncoder]":
    """Load the checkpoint; encoder, autoencoder and encoded prompts are cached for later requests in this process."""
    import torch

    from training.models.saved_model import read_conditioning
    from training.sampling.sampler import load_sampler

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    record = read_conditioning(checkpoint)
    encoder = _text_encoder(config.text_encoder, record.template_version, config.device, config.prompt_memory_bytes)
    sampler = load_sampler(
        checkpoint,
        config.text_encoder,
        config.autoencoder,
        device=config.device,
        encoder=encoder,
        decoder=_autoencoder(config.autoencoder, config.device, record.autoencoder_subfolder),
    )
    return sampler, encoder


def produce(run: StageRun[SamplesConfig]) -> StageResult:
    """Write ``images/<prompt_id>-<k>.png`` and ``samples.parquet`` (prompt_id, sample_index, path, sha256, prompt).

    Inputs: the checkpoint of the arm's strategy, prompt_sets. The rows counted are images: prompts x images per prompt.
    """
    arm_name, benchmark = parse_partition(run.partition)
    try:
        arm = Arm.parse(arm_name)
    except ValueError as error:
        raise ThroughlineError(f"samples {run.partition}: {error}") from error
    checkpoint = run.input("checkpoint")
    if checkpoint.manifest.partition != arm.strategy.value:
        raise ThroughlineError(
            f"samples {run.partition}: got the checkpoint of {checkpoint.manifest.partition}, "
            f"expected that of {arm.strategy}"
        )
    config = run.config
    prompts = read_prompts(run.input("prompt_sets"), benchmark)
    per_prompt = config.images_per_prompt[benchmark]
    size = config.prompts_per_unit
    units = [(f"{start // size:05d}", prompts[start : start + size]) for start in range(0, len(prompts), size)]
    pending = [(name, chunk) for name, chunk in units if not run.is_finished(name)]
    num_done = (len(prompts) - sum(len(chunk) for _, chunk in pending)) * per_prompt
    if pending:
        sampler, encoder = _load_sampler(checkpoint, config)
        settings = config.sampler.model_copy(update={"gate_shift": arm.gate_shift})
        with run.progress(len(prompts) * per_prompt, "images", initial=num_done) as progress:
            for name, chunk in pending:
                with run.unit(name) as unit:
                    images = _sample(sampler, chunk, per_prompt, config.seed, settings)
                    rows = []
                    for prompt, sample_index, image in images:
                        data = png_bytes(image)
                        path = f"images/{prompt.prompt_id}-{sample_index}.png"
                        unit.write(path, data)
                        rows.append(_row(prompt, sample_index, path, data))
                    unit.account(rows_in=len(chunk) * per_prompt, rows_out=len(rows))
                    unit.notes["rows"] = rows
                    truncated = [prompt.prompt_id for prompt in chunk if prompt.prompt in encoder.truncated]
                    unit.notes["truncated"] = truncated
                progress.advance(len(rows))
        _warn_about_truncated(run, encoder.max_tokens)
    rows = [row for unit in _sampled_units(run) for row in unit.notes["rows"]]
    if not run.is_finished("table"):
        _write_table(run, rows)
    summary = {
        "num_images": len(rows),
        "num_prompts": len(prompts),
        "num_truncated_prompts": len(_truncated(run)),
        "images_per_prompt": per_prompt,
    }
    return StageResult(summary=summary, seeds={"noise": config.seed})


def _sampled_units(run: StageRun[SamplesConfig]) -> list[FinishedUnit]:
    return [unit for unit in run.finished_units() if unit.name != "table"]


def _truncated(run: StageRun[SamplesConfig]) -> list[str]:
    """Return the ids of the prompts that were truncated."""
    return [prompt_id for unit in _sampled_units(run) for prompt_id in unit.notes["truncated"]]


def _warn_about_truncated(run: StageRun[SamplesConfig], max_tokens: int) -> None:
    truncated = _truncated(run)
    if truncated:
        logger.warning(
            "%s: %d prompts, such as %s, are longer than the text encoder's %d tokens with their template, and were "
            "truncated; shorten them in the benchmark's file",
            run.label, len(truncated), truncated[0], max_tokens,
        )  # fmt: skip


def _sample(
    sampler: "Sampler", prompts: Sequence[EvaluationPrompt], per_prompt: int, seed: int, settings: SamplerConfig
) -> list[tuple[EvaluationPrompt, int, "Image.Image"]]:
    items = [(prompt, index) for prompt in prompts for index in range(per_prompt)]
    images = sampler.generate([prompt.prompt for prompt, _ in items], [index for _, index in items], seed, settings)
    return [(prompt, index, image) for (prompt, index), image in zip(items, images, strict=True)]


def _row(prompt: EvaluationPrompt, sample_index: int, path: str, data: bytes) -> dict[str, Any]:
    return {
        "prompt_id": prompt.prompt_id,
        "sample_index": sample_index,
        "path": path,
        "sha256": hashlib.sha256(data).hexdigest(),
        "prompt": prompt.prompt,
    }


def _write_table(run: StageRun[SamplesConfig], rows: Sequence[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    schema = pa.schema({"prompt_id": text, "sample_index": pa.int32(), "path": text, "sha256": text, "prompt": text})
    with run.unit("table") as unit, unit.open("samples.parquet", num_rows=len(rows)) as stream:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), stream)


def preview_samples(samples: StageOutput, inputs: Inputs) -> str:
    """Return thumbnails of the first images."""
    files = samples.files(".png")[:NUM_IMAGES]
    return " ".join(thumbnail(path.read_bytes(), path.stem) for path in files)


STAGE = Stage(
    name="samples",
    code_version="2",
    config_type=SamplesConfig,
    produce=produce,
    description="Images sampled from a checkpoint for a benchmark's prompts; all arms start from the same noise.",
    rows=DERIVED,
    checks=(),
    preview=preview_samples,
    funnel_label=None,
    cost=samples_cost,
)
