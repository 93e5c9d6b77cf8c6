"""Measurements for an estimate, from metadata files and finished outputs, and the counts a profile implies.

Shares and sizes come from outputs of the estimated configuration, on any machine; rates only from this machine, and
with the same workers and devices.
"""

import math
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from orchestration.cost.inputs import Measured
from orchestration.profiles.profile import Profile
from pipelines.core.config import identity_of
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import MANIFEST_NAME, Manifest, read_manifest
from pipelines.runner.cost import Facts

_LONG_ENOUGH_SECONDS = 2.0
"""Shorter runs are mostly start-up; for manifests without a rate of their own."""
_NOT_COMPARED = ("revision", "path", "source", "digest_cache")
"""Fields that affect neither rates nor shares, and that the first run may fill in."""


def facts_of(profile: Profile, *, count_parameters: bool) -> Facts:
    """Return the counts a profile implies; counting parameters builds each strategy's model on torch's meta device."""
    parameters: dict[str, int] = {}
    if count_parameters:
        from training.cost.params import count_parameters as count

        parameters = {strategy.value: count(profile.model, strategy) for strategy in profile.strategies}
    local = {model.id: Path(model.path) for model in profile.models().values() if model.path is not None}
    sizes = {name: size for name, folder in local.items() if (size := _num_parameters(folder)) is not None}
    return Facts(parameters=parameters, prompts=_prompts(profile), local_parameters=sizes)


def _num_parameters(folder: Path) -> int | None:
    """Return the parameters of a local model by its files' headers; None where it has no files yet."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    num = 0
    for path in files:
        with safe_open(path, framework="numpy") as tensors:
            num += sum(math.prod(tensors.get_slice(name).get_shape()) for name in list(tensors.keys()))
    return num if files else None


def _prompts(profile: Profile) -> dict[str, int]:
    """Return prompts by benchmark: the number that the profile pins, else that in its files; none without either."""
    from evaluation.benchmarks.prompt_files import parse_drawbench, parse_genai_bench, parse_geneval

    sets = profile.prompt_sets
    parsers: dict[str, tuple[Any, Callable[[], int]]] = {
        "geneval": (sets.geneval, lambda: len(parse_geneval(_path(sets.geneval)))),
        "genai_bench": (
            sets.genai_image,
            lambda: len(parse_genai_bench(_path(sets.genai_image), _path(sets.genai_skills))),
        ),
        "drawbench": (sets.drawbench, lambda: len(parse_drawbench(_path(sets.drawbench)))),
    }
    found: dict[str, int] = {}
    for benchmark in profile.benchmarks:
        file, count = parsers[benchmark]
        if file.num_prompts is None and not Path(file.path).is_file():
            continue
        num = file.num_prompts if file.num_prompts is not None else count()
        found[benchmark] = min(num, sets.limit(benchmark) or num)
    return found


def _path(file: Any) -> Path:
    return Path(file.path)


def measured_for(profile: Profile) -> dict[str, Measured]:
    """Return measurements by assumption, from the metadata files and the finished outputs under the output root."""
    found = dict(_metadata(profile))
    for measure in (_subset, _images, _captions, _shards, _latents, _text, _checkpoint, _samples, _scores):
        found |= dict(measure(profile))
    return found


def _metadata(profile: Profile) -> Iterator[tuple[str, Measured]]:
    """Count the rows of the profile's metadata by the files' footers."""
    from pipelines.laion.schema import open_metadata
    from pipelines.laion.sources import find_sources, size_of
    from pipelines.storage.remote_files import RangeReader

    try:
        places = list(find_sources(profile.source).values())
    except ThroughlineError:
        return  # most estimates are made before there is any metadata
    counts = []
    for place in places:
        with open_metadata(place if isinstance(place, Path) else RangeReader(place)) as metadata:
            counts.append(metadata.metadata.num_rows)
    rows = sum(counts)
    what = f"{len(places)} metadata files"
    yield "rows", Measured(rows, what)
    if rows:
        yield "part_rows", Measured(rows / len(places), what)
        yield "metadata_row_bytes", Measured(sum(size_of(place) for place in places) / rows, what)


@dataclass(frozen=True)
class _Outputs:
    """Manifests of one stage and configuration."""

    stage: str
    manifests: list[Manifest]

    @property
    def what(self) -> str:
        rows = sum(_rows_in(manifest) for manifest in self.manifests)
        return f"{len(self.manifests)} finished outputs of {self.stage} ({rows:,.0f} rows)"

    def ratio(self, top: Callable[[Manifest], float], bottom: Callable[[Manifest], float]) -> Iterable[Measured]:
        """Return the ratio of two sums over the manifests; nothing where either is zero."""
        above, below = sum(map(top, self.manifests)), sum(map(bottom, self.manifests))
        return [Measured(above / below, self.what)] if above > 0 and below > 0 else []

    def rate(self, rows_of: Callable[[Manifest], float]) -> Iterable[Measured]:
        """Return rows a second over the runs that were long enough."""
        return _Outputs(self.stage, [item for item in self.manifests if _seconds(item) >= _LONG_ENOUGH_SECONDS]).ratio(
            rows_of, _seconds
        )


def _find(profile: Profile, stage: str, *configs: BaseModel) -> tuple[_Outputs, _Outputs]:
    """Return the manifests of these configurations, and those among them whose rates apply to this machine."""
    identities = [_comparable(identity_of(config)) for config in configs]
    whole = [_comparable(config.model_dump(mode="json")) for config in configs]
    same, here = [], []
    for manifest in _manifests(profile.output_root / stage):
        if _comparable(manifest.config) not in identities:
            continue
        same.append(manifest)
        is_here = manifest.environment is not None and manifest.environment.host == platform.node()
        if is_here and _comparable(manifest.execution) in whole:
            here.append(manifest)
    return _Outputs(stage, same), _Outputs(stage, here)


def _manifests(folder: Path) -> Iterator[Manifest]:
    for path in sorted(folder.glob(f"*/{MANIFEST_NAME}")):
        try:
            yield read_manifest(path)
        except ThroughlineError as error:
            print(f"excluded from the estimate: {error}", file=sys.stderr)


def _comparable(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {name: _comparable(value) for name, value in config.items() if name not in _NOT_COMPARED}
    return [_comparable(item) for item in config] if isinstance(config, (list, tuple)) else config


def _named(name: str, measured: Iterable[Measured]) -> Iterator[tuple[str, Measured]]:
    return ((name, item) for item in measured)


def _rows_in(manifest: Manifest) -> float:
    return manifest.conservation.rows_in if manifest.conservation else 0


def _rows_out(manifest: Manifest) -> float:
    return manifest.conservation.rows_out if manifest.conservation else 0


def _seconds(manifest: Manifest) -> float:
    return manifest.environment.seconds if manifest.environment else 0.0


def _bytes_of(*suffixes: str) -> Callable[[Manifest], float]:
    return lambda manifest: sum(entry.num_bytes for entry in manifest.files if entry.path.endswith(suffixes))


def _measurement(name: str) -> Callable[[Manifest], float]:
    return lambda manifest: float(manifest.measurements.get(name) or 0)


def _processed(rate: str) -> Callable[[Manifest], float]:
    """Return the items that a run processed, by its own rate: a resumed run processed fewer than its output has."""
    return lambda manifest: _measurement(rate)(manifest) * _measurement("seconds")(manifest)


def _subset(profile: Profile) -> Iterator[tuple[str, Measured]]:
    same, here = _find(profile, "laion_subset", profile.laion_subset)
    yield from _named("pass_rules", same.ratio(_rows_out, _rows_in))
    yield from _named("subset_row_bytes", same.ratio(_bytes_of("rows.parquet"), _rows_out))
    yield from _named("filter_rows_per_second", here.rate(_rows_in))


def _images(profile: Profile) -> Iterator[tuple[str, Measured]]:
    def image_bytes(manifest: Manifest) -> float:
        return sum(entry.num_bytes for entry in manifest.files if entry.path.startswith("images-"))

    same, here = _find(profile, "images", profile.images_config)
    yield from _named("fetched_share", same.ratio(_rows_out, _rows_in))
    yield from _named("image_row_bytes", same.ratio(image_bytes, _rows_out))
    yield from _named("fetch_rows_per_second", here.ratio(_processed("rows_per_second"), _measurement("seconds")))


def _captions(profile: Profile) -> Iterator[tuple[str, Measured]]:
    def tokens(manifest: Manifest) -> float:
        return manifest.summary["mean_caption_tokens"] * manifest.summary["num_captions"]

    same, here = _find(profile, "captions", profile.captions)
    yield from _named("caption_tokens", same.ratio(tokens, _rows_out))
    yield from _named("captioned_share", same.ratio(_rows_out, _rows_in))
    yield from _named("captions_per_second", here.ratio(_processed("captions_per_second"), _measurement("seconds")))


def _shards(profile: Profile) -> Iterator[tuple[str, Measured]]:
    same, here = _find(profile, "shards", profile.shards)
    yield from _named("shard_share", same.ratio(_rows_out, _rows_in))
    yield from _named("shard_sample_bytes", same.ratio(_bytes_of(".tar", ".index.json"), _rows_out))
    yield from _named("shard_samples_per_second", here.rate(_rows_in))


def _latents(profile: Profile) -> Iterator[tuple[str, Measured]]:
    _, here = _find(profile, "latents", profile.latents)
    yield from _named("latents_per_second", here.ratio(_processed("images_per_second"), _measurement("seconds")))


def _text(profile: Profile) -> Iterator[tuple[str, Measured]]:
    if profile.text_features is None:
        return
    same, here = _find(profile, "text_features", profile.text_features)
    yield from _named("text_tokens", same.ratio(lambda manifest: manifest.summary["num_tokens"], _rows_out))
    yield from _named(
        "text_features_per_second", here.ratio(_processed("captions_per_second"), _measurement("seconds"))
    )


def _checkpoint(profile: Profile) -> Iterator[tuple[str, Measured]]:
    """Any number and length of steps will do: operations a second depend on the model and the processes."""
    model, training = profile.model.model_dump(mode="json"), profile.training
    wanted = {name: getattr(training, name) for name in ("num_processes", "device", "precision", "threads", "sharded")}
    here = [
        manifest
        for manifest in _manifests(profile.output_root / "checkpoint")
        if manifest.environment is not None
        and manifest.environment.host == platform.node()
        and manifest.execution["model"] == model
        and {name: manifest.execution["training"].get(name) for name in wanted} == wanted
    ]
    found = _Outputs("checkpoint", here)
    seconds, rate = _measurement("seconds_in_steps"), _measurement("model_flops_per_second")
    processes = training.num_processes
    yield from _named(
        "training_flops_per_second",
        found.ratio(lambda item: rate(item) * seconds(item), lambda item: seconds(item) * processes),
    )


def _samples(profile: Profile) -> Iterator[tuple[str, Measured]]:
    _, here = _find(profile, "samples", profile.samples)
    yield from _named("samples_per_second", here.rate(_rows_out))


def _scores(profile: Profile) -> Iterator[tuple[str, Measured]]:
    def answers(manifest: Manifest) -> float:
        return manifest.summary["num_answers"]

    same, here = _find(profile, "scores", profile.scores)
    asked = [item for item in same.manifests if (item.partition or "").endswith("|geneval")]
    yield from _named("questions_per_image", _Outputs("scores", asked).ratio(answers, _rows_in))
    if profile.drawbench_scores is None:
        yield from _named("answers_per_second", here.rate(answers))
