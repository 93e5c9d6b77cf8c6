"""Collects the report's contents from finished outputs: counts, curves, images, grids. HTML is up to the template."""

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evaluation.config import Benchmark, parse_partition
from evaluation.judging.caption_tables import caption_tables, even_indices
from evaluation.report.lineage import Lineage
from pipelines.core.manifest import EARLIER
from pipelines.dataset.dataset import left_out_as_withdrawn
from pipelines.runner.outputs import StageOutput
from pipelines.runner.stage import Stage

_WEBP_QUALITY = 82


@dataclass(frozen=True)
class FunnelStep:
    """Rows into and out of a stage, summed over its parts."""

    stage: str
    label: str
    rows_in: int
    rows_out: int
    dropped: Sequence[tuple[str, int]]
    """(reason, rows), most frequent first."""


def funnel(lineage: Lineage, stages: Mapping[str, Stage[Any]]) -> list[FunnelStep]:
    """Return the steps from metadata rows to training samples: the stages with a label that counted rows.

    Ignores outputs that a later output of the same stage replaced.
    """
    replaced = {
        ref.data_version
        for items in lineage.values()
        for item in items
        for ref in item.manifest.inputs.get(EARLIER, ())
    }
    steps = []
    for name, outputs in lineage.items():
        label = stages[name].funnel_label if name in stages else None
        current = [item for item in outputs if item.data_version not in replaced]
        tables = [item.manifest.conservation for item in current if item.manifest.conservation]
        if label is None or not tables:
            continue
        reasons: Counter[str] = Counter()
        for table in tables:
            reasons.update(table.dropped)
        dropped = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        steps.append(FunnelStep(name, label, sum(t.rows_in for t in tables), sum(t.rows_out for t in tables), dropped))
    return steps


def image_data_uri(image_bytes: bytes, size_px: int) -> str:
    """Return an encoded image as a WebP data URI, scaled down to fit a square of `size_px`."""
    from PIL import Image

    with Image.open(io.BytesIO(image_bytes)) as image:
        small = image.convert("RGB")
        if max(small.size) > size_px:
            small.thumbnail((size_px, size_px), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        small.save(stream, "WEBP", quality=_WEBP_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


@dataclass(frozen=True)
class CaptionedImage:
    """A training image with its alt-text and its caption."""

    sample_key: str
    alt_text: str
    caption: str
    uri: str


def sample_captions(lineage: Lineage, limit: int, size_px: int) -> list[CaptionedImage]:
    """Return at most `limit` captions with their images, spread evenly over parts, tables and sample keys.

    Reads at most `limit` tables. Rows that the data set dropped as withdrawn are not shown.
    """
    withdrawn = left_out_as_withdrawn(lineage.get("dataset", ()))
    tables = caption_tables(lineage.get("images", ()), lineage.get("captions", ()))
    chosen = [tables[index] for index in even_indices(len(tables), limit)]
    shown: list[CaptionedImage] = []
    for number, table in enumerate(chosen):
        count = limit * (number + 1) // len(chosen) - limit * number // len(chosen)
        captions = {key: text for key, text in table.captions().items() if key not in withdrawn}
        keys = sorted(captions)
        images = table.images({keys[index] for index in even_indices(len(keys), count)})
        for key, (alt_text, image_bytes) in sorted(images.items()):
            shown.append(CaptionedImage(key, alt_text, captions[key], image_data_uri(image_bytes, size_px)))
    return shown


@dataclass(frozen=True)
class LossCurve:
    """A strategy's training losses by step, and its validation losses if it has any."""

    strategy: str
    steps: Sequence[int]
    losses: Sequence[float]
    validation: Sequence[tuple[int, float]]


def loss_curves(lineage: Lineage) -> list[LossCurve]:
    """Return the losses of all checkpoints, in the order of the strategies."""
    from training.config import Strategy

    order = [strategy.value for strategy in Strategy]
    curves = []
    for output in lineage.get("checkpoint", ()):
        rows = [json.loads(line) for line in output.path("metrics.jsonl").read_text().splitlines()]
        validation = [(row["step"], row["validation_loss"]) for row in rows if row.get("validation_loss") is not None]
        rows = [row for row in rows if row["loss"] is not None]  # a skipped step may have none
        curves.append(
            LossCurve(
                output.manifest.partition or "",
                [row["step"] for row in rows],
                [row["loss"] for row in rows],
                validation,
            )
        )
    return sorted(curves, key=lambda curve: order.index(curve.strategy) if curve.strategy in order else len(order))


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean over the last `window` values at each position (fewer at the start)."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


def subsample(values: Sequence[Any], target: int = 240) -> list[Any]:
    """Return about `target` evenly spaced values, including the last one."""
    step = max(1, len(values) // target)
    chosen = list(values[::step])
    return chosen if not values or (len(values) - 1) % step == 0 else [*chosen, values[-1]]


@dataclass(frozen=True)
class GridCell:
    """An image of the sample grid, with the judge's scores for it."""

    uri: str | None
    scores: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True)
class GridRow:
    """A prompt with one image per arm."""

    prompt_id: str
    prompt: str
    skills: Sequence[str]
    cells: Sequence[GridCell]


@dataclass(frozen=True)
class Grid:
    """The sample grid of a benchmark."""

    benchmark: str
    arms: Sequence[str]
    rows: Sequence[GridRow] = field(default_factory=list)


def sample_grid(lineage: Lineage, benchmark: Benchmark, arms: Sequence[str], limit: int, size_px: int) -> Grid:
    """Return a grid of at most `limit` prompts that all arms have, with the first sample of each arm."""
    import pyarrow.parquet as pq

    samples: dict[str, tuple[StageOutput, dict[str, dict[str, Any]]]] = {}
    for output in lineage.get("samples", ()):
        arm, sampled_benchmark = parse_partition(output.manifest.partition)
        if sampled_benchmark == benchmark:
            rows = pq.read_table(output.path("samples.parquet")).to_pylist()
            samples[arm] = (output, {row["prompt_id"]: row for row in rows if row["sample_index"] == 0})
    shown = [arm for arm in arms if arm in samples]
    if not shown:
        return Grid(benchmark, [])
    scores, skills = _scores_of_first_samples(lineage, benchmark)
    common = sorted(set.intersection(*(set(samples[arm][1]) for arm in shown)))
    rows = []
    for prompt_id in _spread_over_skills(common, skills, limit):
        cells = []
        for arm in shown:
            output, by_prompt = samples[arm]
            uri = image_data_uri(output.path(by_prompt[prompt_id]["path"]).read_bytes(), size_px)
            cells.append(GridCell(uri, scores.get((arm, prompt_id), ())))
        prompt = samples[shown[0]][1][prompt_id]["prompt"]
        rows.append(GridRow(prompt_id, prompt, skills.get(prompt_id, ()), cells))
    return Grid(benchmark, shown, rows)


def _spread_over_skills(prompt_ids: Sequence[str], skills: Mapping[str, Sequence[str]], limit: int) -> list[str]:
    """Choose prompts round-robin from groups with the same first two skills, and return them in order."""
    groups: dict[str, list[str]] = {}
    for prompt_id in prompt_ids:
        groups.setdefault(" ".join(skills.get(prompt_id, ())[:2]), []).append(prompt_id)
    queues = [list(group) for group in groups.values()]
    if len(queues) > limit:
        queues = [queues[index] for index in even_indices(len(queues), limit)]
    chosen: list[str] = []
    while len(chosen) < limit and any(queues):
        for queue in queues:
            if queue and len(chosen) < limit:
                chosen.append(queue.pop(0))
    return sorted(chosen)


def _scores_of_first_samples(
    lineage: Lineage, benchmark: Benchmark
) -> tuple[dict[tuple[str, str], list[tuple[str, float]]], dict[str, tuple[str, ...]]]:
    import pyarrow.parquet as pq

    scores: dict[tuple[str, str], list[tuple[str, float]]] = {}
    skills: dict[str, tuple[str, ...]] = {}
    for output in lineage.get("scores", ()):
        arm, scored_benchmark = parse_partition(output.manifest.partition)
        if scored_benchmark != benchmark:
            continue
        for row in pq.read_table(output.path("scores.parquet")).to_pylist():
            skills[row["prompt_id"]] = tuple(row["skills"])
            if row["sample_index"] == 0:
                scores.setdefault((arm, row["prompt_id"]), []).append((row["metric"], row["value"]))
    return scores, skills


@dataclass(frozen=True)
class ProvenanceRow:
    """A stage's outputs of one code version, with the models and external files they used."""

    stage: str
    code_version: str
    outputs: Sequence[tuple[str, str]]
    """(partition, data version)."""
    num_more: int
    models: Sequence[tuple[str, str]]
    """(model, revision)."""
    sources: Sequence[tuple[str, str]]
    """(file, SHA-256) of files from outside the graph."""


def provenance(lineage: Lineage, max_outputs: int = 24) -> list[ProvenanceRow]:
    """Return one row per stage and code version, in graph order, with at most `max_outputs` outputs listed."""
    rows = []
    for stage, outputs in lineage.items():
        by_version: dict[str, list[StageOutput]] = {}
        for output in outputs:
            by_version.setdefault(output.manifest.code_version, []).append(output)
        for code_version, items in by_version.items():
            models = {(model.id, model.revision) for item in items for model in item.manifest.models}
            sources = {(source.name, source.sha256) for item in items for source in item.manifest.sources}
            listed = [(item.manifest.partition or "", item.data_version) for item in items]
            num_more = max(0, len(listed) - max_outputs)
            rows.append(
                ProvenanceRow(
                    stage, code_version, listed[:max_outputs], num_more, sorted(models), sorted(sources)[:max_outputs]
                )
            )
    return rows
