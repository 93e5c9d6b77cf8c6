"""What an estimate takes for granted where nothing was measured: one number each, with the reason for it.

Each can be set on the command line; one that is measured on this machine stands aside for the measurement. A field of
None is worked out from the others.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from pipelines.core.config import FrozenConfig
from pipelines.core.errors import ThroughlineError


class Assumptions(FrozenConfig):
    """Numbers that neither the profile nor a measurement gives."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    # The metadata, and what its filters leave
    rows: int = Field(413_000_000, ge=1)
    """Rows of metadata. LAION-400M has 413 M by its own page (laion.ai/blog/laion-400-open-dataset)."""
    part_rows: int = Field(12_910_000, ge=1)
    """Rows of one metadata file: LAION-400M comes in 32 files of 12.9 M rows."""
    metadata_row_bytes: float = Field(130, gt=0)
    """Bytes of a row of metadata: LAION-400M's files hold about 54 GB in all."""
    pass_rules: float | None = Field(None, ge=0, le=1)
    """Share of rows that all filters keep; none: the product of the shares below that the profile has a rule for."""
    pass_similarity: float = Field(1.0, ge=0, le=1)
    """LAION-400M was cut at a similarity of 0.3 before it was published; a higher threshold keeps less."""
    pass_nsfw: float = Field(0.93, ge=0, le=1)
    """Rows of an allowed NSFW label. A guess: read it off the funnel of one metadata file (throughline subset)."""
    pass_size: float | None = Field(None, ge=0, le=1)
    """Rows whose sides are long enough; none: between the counts on LAION-400M's page (both sides at least 256 px 211 M
    of 413 M, 512 px 67 M, 1024 px 9.6 M)."""
    pass_aspect: float = Field(0.97, ge=0, le=1)
    """Rows within the aspect limit. A guess, as for pass_nsfw."""
    pass_text: float = Field(0.98, ge=0, le=1)
    """Rows whose text has an allowed length. A guess, as for pass_nsfw."""
    pass_unique: float = Field(0.98, ge=0, le=1)
    """Rows whose URL is the first of its kind in the part. A guess: LAION removed equal pairs, not equal URLs."""
    pass_other: float = Field(1.0, ge=0, le=1)
    """Rows that each further rule keeps (lists, language, licence, aesthetic, watermark, where). 1 stands for not
    known: set it."""
    subset_row_bytes: float = Field(150, gt=0)
    """Bytes of a kept row in its zstd table: URL, text, key and labels."""

    # Filtering, on one core
    filter_rows_per_second: float = Field(350_000, gt=0)
    """Rows that one process filters on a server's core; --calibrate measures it."""
    filter_base_bytes: float = Field(300e6, ge=0)
    """Memory of a filtering process before it remembers any row; --calibrate measures it."""
    filter_bytes_per_row: float = Field(44, ge=0)
    """Memory that grows with a part's rows: 44 bytes between parts of 0.2 and 3.2 M rows, most of it the table of URLs
    (24 bytes a slot, a fifth of all slots and more empty); --calibrate measures it."""
    selection_rows_per_second: float = Field(700_000, gt=0)
    """Kept rows that one process compares between parts (duplicates, sampling); --calibrate measures it."""
    cores_per_node: int = Field(32, ge=1)
    """Cores of a machine that filters or decodes."""

    # The web
    dead_link_share: float = Field(0.35, ge=0, le=1)
    """Links that no longer give a picture. Reports of recent downloads of LAION-400M lie between 0.2 and 0.45."""
    bad_image_share: float = Field(0.03, ge=0, le=1)
    """Answers that are no usable picture: HTML, broken, animated, smaller than the table says. A guess."""
    fetched_share: float | None = Field(None, ge=0, le=1)
    """Share of asked rows that end as a picture; none: what dead links and bad pictures leave."""
    retry_share: float = Field(0.2, ge=0)
    """Further requests for each row, where the profile allows them: failures that may heal are asked again."""
    request_seconds: float = Field(2.0, gt=0)
    """Mean time a connection is busy with a request. Pictures take about 0.3 s; hosts that don't answer hold theirs
    until the time-out, so that one in ten of them decides the mean."""
    mean_image_bytes: float = Field(100_000, gt=0)
    """Bytes of a picture as it is sent. A public copy of LAION-400M holds 63 kB a picture of any size; those with both
    sides from 256 px are larger."""
    network_mbit: float = Field(1000, gt=0)
    """Megabits a second that one node gets from the web."""
    fetch_rows_per_second: float | None = Field(None, gt=0)
    """Rows a node downloads in a second; none: the slowest of network, connections and decoders."""
    decode_images_per_second: float = Field(100, gt=0)
    """Pictures that one core decodes, resizes and encodes again; --calibrate measures it."""
    source_width_px: int = Field(800, ge=8)
    """Width of the picture that --calibrate decodes."""
    source_height_px: int = Field(600, ge=8)
    """Height of the picture that --calibrate decodes."""
    jpeg_bytes_per_px: float = Field(0.5, gt=0)
    """Bytes a pixel of the training pictures (JPEG, quality 95): photographs at 256 px take 25 to 40 kB."""
    image_row_bytes: float | None = Field(None, gt=0)
    """Bytes of a picture with its row in the table of images; none: JPEG bytes, and those of a subset row."""

    # Captions and shards
    caption_tokens: float = Field(150, gt=0)
    """Tokens of a caption. A dense paragraph of about 110 words; the profile's limit cuts it."""
    chars_per_token: float = Field(4.4, gt=0)
    """Characters of English prose to a token of a vocabulary of 150,000."""
    chat_tokens: float = Field(14, ge=0)
    """Tokens that the chat template puts around a question."""
    vlm_px_per_token: float = Field(32, gt=0)
    """Side of the image square that is one token: Qwen3-VL merges 2 x 2 patches of 16 px."""
    row_bytes: float = Field(120, gt=0)
    """Bytes of keys, counts and flags in a row of a table, beside its text."""
    captioned_share: float = Field(0.998, ge=0, le=1)
    """Pictures that get a caption. A guess: engines refuse few."""
    shard_share: float = Field(0.99, ge=0, le=1)
    """Captions that are neither empty nor cut, which the shards keep. A guess."""
    shard_sample_bytes: float | None = Field(None, gt=0)
    """Bytes of a sample in its tar; none: the picture and shard_extra_bytes."""
    shard_extra_bytes: float = Field(4_000, gt=0)
    """Bytes of a sample beside its picture: three tar headers, provenance, caption, padding and the index's row."""
    shard_samples_per_second: float = Field(4_000, gt=0)
    """Samples that one process writes into tars; --calibrate measures it."""

    # Accelerators
    gpu: str = "H100"
    """GPU of every node, by the name that CUDA gives."""
    gpu_flops: float | None = Field(None, gt=0)
    """Dense bfloat16 operations a second of one GPU; none: the maker's figure for `gpu`."""
    gpus: int | None = Field(None, ge=1)
    """GPUs that captions, training and judges share at best; none: those that the profile's pools and launches ask
    for."""
    gpus_per_node: int = Field(8, ge=1)
    """GPUs of a machine, as in the common servers; the profile's own number stands before it."""
    parallel_runs: int = Field(1, ge=1)
    """Runs of one stage side by side, each on hardware of its own. 1 is what the queue of runs allows as delivered."""
    cpu_flops: float = Field(5e10, gt=0)
    """Operations a second that a process on a CPU reaches, where a profile uses no GPU or a step runs without one."""
    mfu: float = Field(0.35, gt=0, le=1)
    """Share of a GPU's peak that a training step uses: a usual figure for transformers of this size with attention
    products counted; another GPU count or a slow network lowers it."""
    prefill_mfu: float = Field(0.4, gt=0, le=1)
    """Share of the peak while a vision-language model reads image and question."""
    decode_mfu: float = Field(0.08, gt=0, le=1)
    """Share of the peak while it writes: bound by memory, so that large batches raise it."""
    vlm_tokens_per_second: float | None = Field(None, gt=0)
    """Answer tokens a second and GPU of the captioner; none: by decode_mfu."""
    captioner_params: float | None = Field(None, gt=0)
    """Active parameters of the captioner; none: by the model's name (32B, A22B) or its files."""
    judge_params: float | None = Field(None, gt=0)
    """Active parameters of the judges; none: as for the captioner."""
    captions_per_second: float | None = Field(None, gt=0)
    """Captions a second of the whole pool; none: by operations."""
    encode_mfu: float = Field(0.4, gt=0, le=1)
    """Share of the peak while the text encoder reads captions."""
    text_tokens: float | None = Field(None, gt=0)
    """Tokens of a text as the encoder reads it; none: the caption's and the template's."""
    text_features_per_second: float | None = Field(None, gt=0)
    """Texts a second of one process; none: by operations."""
    vae_mfu: float = Field(0.25, gt=0, le=1)
    """Share of the peak of the autoencoder's convolutions."""
    vae_encode_flops_per_px: float = Field(4.2e6, gt=0)
    """Operations of the autoencoder's encoder for a pixel: counted by hand over SD3's layers (128 to 512 channels)."""
    vae_decode_flops_per_px: float = Field(9.5e6, gt=0)
    """Operations of its decoder for a pixel, counted likewise."""
    latents_per_second: float | None = Field(None, gt=0)
    """Images a second of one process of the stage latents; none: by operations."""
    training_flops_per_second: float | None = Field(None, gt=0)
    """Operations a second that one training process reaches; none: the peak times mfu."""

    # Evaluation
    sample_mfu: float = Field(0.3, gt=0, le=1)
    """Share of the peak while images are drawn."""
    samples_per_second: float | None = Field(None, gt=0)
    """Images a second of one process of the stage samples; none: by operations."""
    png_bytes_per_px: float = Field(1.6, gt=0)
    """Bytes a pixel of a drawn image, written as PNG."""
    prompt_tokens: float = Field(20, gt=0)
    """Tokens of a benchmark's prompt: most are one sentence."""
    questions_per_image: float = Field(1.9, gt=0)
    """Yes-or-no questions about an image of GenEval, one for each object or relation of its prompt."""
    rating_tokens: float = Field(40, gt=0)
    """Tokens of a rating: three lines."""
    answers_per_second: float | None = Field(None, gt=0)
    """Answers a second of the whole pool of a judge; none: by operations."""

    @model_validator(mode="after")
    def _check_gpu(self) -> Self:
        from training.cost.step_cost import known_gpus, peak_flops_by_name

        if self.gpu_flops is None and peak_flops_by_name(self.gpu) is None:
            raise ValueError(
                f"no peak is known for gpu {self.gpu!r}; there are {', '.join(known_gpus())}, or set gpu_flops"
            )
        return self


def parse_assumptions(words: Sequence[str]) -> tuple[Assumptions, frozenset[str]]:
    """Return the assumptions that ``name=value`` words make, and the names that they set.

    Raises ThroughlineError with one sentence for a name that does not exist and for a value that makes no sense.
    """
    values: dict[str, str] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not text:
            raise ThroughlineError(f"--assume {word}: expected NAME=VALUE, such as mfu=0.4")
        if name not in Assumptions.model_fields:
            raise ThroughlineError(f"no assumption {name!r}; there are {', '.join(Assumptions.model_fields)}")
        values[name] = text
    try:
        return Assumptions.model_validate(_numbers(values)), frozenset(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        said = problem["msg"].removeprefix("Value error, ")
        given = f"--assume {where}={values[where]}: " if where in values else ""
        raise ThroughlineError(f"{given}{said[:1].lower()}{said[1:]}") from error


def _numbers(values: Mapping[str, str]) -> dict[str, Any]:
    """Let whole numbers be written as 4e8 or 400_000_000 too."""
    found: dict[str, Any] = {}
    for name, text in values.items():
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = text
    return found


def reasons() -> dict[str, str]:
    """Return why each assumption is what it is, by name."""
    return {name: " ".join((field.description or "").split()) for name, field in Assumptions.model_fields.items()}
