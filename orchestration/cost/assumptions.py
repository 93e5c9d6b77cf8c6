"""The assumptions of an estimate: numbers for what was not measured, each with its reason.

The command line can set each of them; a measurement on this machine replaces it. A field of None is derived from the
others.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from pipelines.core.config import FrozenConfig
from pipelines.core.errors import ThroughlineError


class Assumptions(FrozenConfig):
    """Numbers that neither the profile nor a measurement provides."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    # Metadata and the selectivity of its filters
    rows: int = Field(413_000_000, ge=1)
    """Rows of metadata. LAION-400M has 413 M according to its page (laion.ai/blog/laion-400-open-dataset)."""
    part_rows: int = Field(12_910_000, ge=1)
    """Rows of one metadata file: LAION-400M comes in 32 files of 12.9 M rows."""
    metadata_row_bytes: float = Field(130, gt=0)
    """Bytes of a row of metadata: LAION-400M's files hold about 54 GB in all."""
    pass_rules: float | None = Field(None, ge=0, le=1)
    """Selectivity of all filters together; none: the product of those below that the profile has a rule for."""
    pass_similarity: float = Field(1.0, ge=0, le=1)
    """Selectivity of the similarity threshold. LAION-400M was published with a threshold of 0.3; a higher one keeps
    less."""
    pass_nsfw: float = Field(0.93, ge=0, le=1)
    """Share of rows with an allowed NSFW label. A guess: `throughline subset` on one metadata file
    measures it."""
    pass_size: float | None = Field(None, ge=0, le=1)
    """Share of rows with both sides long enough; none: interpolated between the counts on LAION-400M's page (256 px
    211 M of 413 M, 512 px 67 M, 1024 px 9.6 M)."""
    pass_aspect: float = Field(0.97, ge=0, le=1)
    """Share of rows within the aspect limit. A guess, as for pass_nsfw."""
    pass_text: float = Field(0.98, ge=0, le=1)
    """Share of rows whose text has an allowed length. A guess, as for pass_nsfw."""
    pass_unique: float = Field(0.98, ge=0, le=1)
    """Share of rows that remain after URL dedup within the part. A guess: LAION deduplicated pairs, not URLs."""
    pass_other: float = Field(1.0, ge=0, le=1)
    """Selectivity of each further rule (lists, language, licence, aesthetic, watermark, where). Unknown, and 1 unless
    set."""
    subset_row_bytes: float = Field(150, gt=0)
    """Bytes of a row that passed the filters, in its zstd table: URL, text, key and labels."""

    # Filtering, on one core
    filter_rows_per_second: float = Field(350_000, gt=0)
    """Rows a second that one process filters on a server's core; --calibrate measures it."""
    filter_base_bytes: float = Field(300e6, ge=0)
    """Memory of a filtering process before its first row; --calibrate measures it."""
    filter_bytes_per_row: float = Field(44, ge=0)
    """Memory that grows with a part's rows: 44 bytes a row between parts of 0.2 and 3.2 M rows, most of it the URL hash
    table (24 bytes a slot, at least a fifth of the slots empty); --calibrate measures it."""
    selection_rows_per_second: float = Field(700_000, gt=0)
    """Filtered rows a second that one process dedups and samples across parts; --calibrate measures it."""
    cores_per_node: int = Field(32, ge=1)
    """Cores of a machine that filters or decodes."""

    # The web
    dead_link_share: float = Field(0.35, ge=0, le=1)
    """Share of links that no longer return an image. Recent downloads of LAION-400M report 0.2 to 0.45."""
    bad_image_share: float = Field(0.03, ge=0, le=1)
    """Share of responses without a usable image: HTML, broken, animated, smaller than the metadata states. A guess."""
    fetched_share: float | None = Field(None, ge=0, le=1)
    """Share of requested rows that yield an image; none: the rows without dead links and bad images."""
    retry_share: float = Field(0.2, ge=0)
    """Retries for each row, where the profile allows them: transient failures are retried."""
    request_seconds: float = Field(2.0, gt=0)
    """Mean time that a request occupies a connection. Images take about 0.3 s; hosts that don't answer occupy theirs
    until the time-out, so one in ten of them dominates the mean."""
    mean_image_bytes: float = Field(100_000, gt=0)
    """Bytes of an image as downloaded. A public copy of LAION-400M has 63 kB an image of any size; those with both
    sides from 256 px are larger."""
    network_mbit: float = Field(1000, gt=0)
    """Megabits a second that one node downloads from the web."""
    fetch_rows_per_second: float | None = Field(None, gt=0)
    """Rows a second that one node downloads; none: the slowest of network, connections and decoders."""
    decode_images_per_second: float = Field(100, gt=0)
    """Images a second that one core decodes, resizes and re-encodes; --calibrate measures it."""
    source_width_px: int = Field(800, ge=8)
    """Width of the image that --calibrate decodes."""
    source_height_px: int = Field(600, ge=8)
    """Height of the image that --calibrate decodes."""
    jpeg_bytes_per_px: float = Field(0.5, gt=0)
    """Bytes a pixel of the training images (JPEG, quality 95): photographs at 256 px take 25 to 40 kB."""
    image_row_bytes: float | None = Field(None, gt=0)
    """Bytes of an image with its row in the table of images; none: the JPEG's and those of a subset row."""

    # Captions and shards
    caption_tokens: float = Field(150, gt=0)
    """Tokens of a caption: a dense paragraph of about 110 words. The profile's limit truncates it."""
    chars_per_token: float = Field(4.4, gt=0)
    """Characters of English prose for each token of a 150,000-token vocabulary."""
    chat_tokens: float = Field(14, ge=0)
    """Tokens that the chat template adds to a question."""
    vlm_px_per_token: float = Field(32, gt=0)
    """Side of the image square that is one token: Qwen3-VL merges 2 x 2 patches of 16 px."""
    row_bytes: float = Field(120, gt=0)
    """Bytes of keys, counts and flags in a row of a table, without its text."""
    captioned_share: float = Field(0.998, ge=0, le=1)
    """Share of images that get a caption. A guess: engines refuse few."""
    shard_share: float = Field(0.99, ge=0, le=1)
    """Share of captions that are neither empty nor truncated; shards drop the others. A guess."""
    shard_sample_bytes: float | None = Field(None, gt=0)
    """Bytes of a sample in its tar; none: the image and shard_extra_bytes."""
    shard_extra_bytes: float = Field(4_000, gt=0)
    """Bytes of a sample without its image: three tar headers, provenance, caption, padding and its index entry."""
    shard_samples_per_second: float = Field(4_000, gt=0)
    """Samples a second that one process writes into tars; --calibrate measures it."""

    # Accelerators
    gpu: str = "H100"
    """GPU model of every node, by the name that CUDA reports."""
    gpu_flops: float | None = Field(None, gt=0)
    """Dense bfloat16 operations a second of one GPU; none: the manufacturer's figure for `gpu`."""
    gpus: int | None = Field(None, ge=1)
    """GPUs for captions, training and judges, each using all of them; none: those that the profile's pools and launches
    request."""
    gpus_per_node: int = Field(8, ge=1)
    """GPUs of a machine, as in common servers; the profile's own number overrides it."""
    parallel_runs: int = Field(1, ge=1)
    """Concurrent runs of one stage, each on its own hardware. 1 is the run queue's default."""
    cpu_flops: float = Field(5e10, gt=0)
    """Operations a second of a CPU process, for profiles and stages without a GPU."""
    mfu: float = Field(0.35, gt=0, le=1)
    """Share of a GPU's peak that a training step uses: typical for transformers of this size with attention products
    counted; more GPUs or a slow network lower it."""
    prefill_mfu: float = Field(0.4, gt=0, le=1)
    """Share of the peak while a vision-language model prefills image and question."""
    decode_mfu: float = Field(0.08, gt=0, le=1)
    """Share of the peak while it decodes: bound by memory bandwidth, so larger batches raise it."""
    vlm_tokens_per_second: float | None = Field(None, gt=0)
    """Tokens a second that the captioner generates on one GPU; none: by decode_mfu."""
    captioner_params: float | None = Field(None, gt=0)
    """Active parameters of the captioner; none: by the model's name (32B, A22B) or its files."""
    judge_params: float | None = Field(None, gt=0)
    """Active parameters of the judges; none: by the model's name or its files."""
    captions_per_second: float | None = Field(None, gt=0)
    """Captions a second of the whole pool; none: by operation count."""
    encode_mfu: float = Field(0.4, gt=0, le=1)
    """Share of the peak while the text encoder encodes captions."""
    text_tokens: float | None = Field(None, gt=0)
    """Tokens of a text as encoded; none: the caption's and the template's."""
    text_features_per_second: float | None = Field(None, gt=0)
    """Texts a second that one process encodes; none: by operation count."""
    vae_mfu: float = Field(0.25, gt=0, le=1)
    """Share of the peak that the autoencoder's convolutions use."""
    vae_encode_flops_per_px: float = Field(4.2e6, gt=0)
    """Operations of the autoencoder's encoder for each pixel, counted by hand over SD3's layers (128 to 512
    channels)."""
    vae_decode_flops_per_px: float = Field(9.5e6, gt=0)
    """Operations of its decoder for each pixel, counted likewise."""
    latents_per_second: float | None = Field(None, gt=0)
    """Images a second that one process of the stage latents encodes; none: by operation count."""
    training_flops_per_second: float | None = Field(None, gt=0)
    """Operations a second of one training process; none: the peak times mfu."""

    # Evaluation
    sample_mfu: float = Field(0.3, gt=0, le=1)
    """Share of the peak while images are sampled."""
    samples_per_second: float | None = Field(None, gt=0)
    """Images a second that one process of the stage samples generates; none: by operation count."""
    png_bytes_per_px: float = Field(1.6, gt=0)
    """Bytes a pixel of a sampled image, written as PNG."""
    prompt_tokens: float = Field(20, gt=0)
    """Tokens of a benchmark's prompt: most prompts are one sentence."""
    questions_per_image: float = Field(1.9, gt=0)
    """Yes-or-no questions about a GenEval image, one for each object or relation in its prompt."""
    rating_tokens: float = Field(40, gt=0)
    """Tokens of a rating: three lines."""
    answers_per_second: float | None = Field(None, gt=0)
    """Answers a second of a judge's whole pool; none: by operation count."""

    @model_validator(mode="after")
    def _check_gpu(self) -> Self:
        from training.cost.step_cost import known_gpus, peak_flops_by_name

        if self.gpu_flops is None and peak_flops_by_name(self.gpu) is None:
            raise ValueError(
                f"no peak is known for gpu {self.gpu!r}; there are {', '.join(known_gpus())}, or set gpu_flops"
            )
        return self


def parse_assumptions(words: Sequence[str]) -> tuple[Assumptions, frozenset[str]]:
    """Return the assumptions set by ``name=value`` words, and the names set.

    Raises ThroughlineError for an unknown name or an invalid value.
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
        message = problem["msg"].removeprefix("Value error, ")
        given = f"--assume {where}={values[where]}: " if where in values else ""
        raise ThroughlineError(f"{given}{message[:1].lower()}{message[1:]}") from error


def _numbers(values: Mapping[str, str]) -> dict[str, Any]:
    """Return the values as numbers where they are: 4e8 and 400_000_000 are whole numbers too."""
    found: dict[str, Any] = {}
    for name, text in values.items():
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = text
    return found


def reasons() -> dict[str, str]:
    """Return the reason for each assumption, by name."""
    return {name: " ".join((field.description or "").split()) for name, field in Assumptions.model_fields.items()}
