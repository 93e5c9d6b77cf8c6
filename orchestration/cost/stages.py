"""What a profile will cost, stage by stage, before anything runs: pure arithmetic over `estimate_inputs`.

Not to be confused with `orchestration.graph.resolution`, which says what each asset is made from. What is small beside
the stages estimated is left out; docs/plan.md names it with the reasons.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from orchestration.cost.advice import notes_of
from orchestration.cost.inputs import Inputs
from orchestration.cost.models import ModelEstimator
from orchestration.cost.quantity import ZERO, Figure, largest, smallest, total
from orchestration.cost.selectivity import passed_share
from orchestration.profiles.profile import AUTOENCODER_FACTOR

STAGES = (
    "laion_subset", "images", "captions", "shards", "latents", "text_features", "checkpoint", "samples", "scores",
)  # fmt: skip
_BITS_PER_MEGABIT_BYTE = 8 / 1e6
_FILTERING_NODES = (1, 2, 4, 8, 16)
_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """What one stage reads, makes and takes. Bytes are those on disk; `seconds` is the time on the wall."""

    stage: str
    partition: str | None = None
    rows_in: Figure
    rows_out: Figure
    bytes_in: Figure
    bytes_out: Figure
    requests: Figure = ZERO
    """Asked of the web, of a vision-language model, or of a judge."""
    seconds: Figure
    nodes: Figure
    gpus: Figure = ZERO
    scratch_bytes: Figure = ZERO
    """On disk only while it runs."""
    limit: str
    """What decides the time."""

    @property
    def name(self) -> str:
        return f"{self.stage} {self.partition}" if self.partition else self.stage

    @property
    def gpu_seconds(self) -> Figure:
        return self.seconds * self.gpus


@dataclass(frozen=True, kw_only=True)
class FilteringEstimate:
    """Filtering all metadata with `processes` on each of `nodes` machines, duplicates between parts included."""

    nodes: int
    processes: Figure
    seconds: Figure
    selection_seconds: Figure
    """Of `seconds`: comparing the parts' rows, one process on one machine."""
    memory_bytes: Figure
    """Of one machine."""


@dataclass(frozen=True, kw_only=True)
class TextEstimate:
    """What the text encoder's layers cost: stored once, or made anew for every batch where the profile stores none."""

    is_stored: bool
    sample_bytes: Figure
    """All layers of one caption."""
    stored_bytes: Figure
    """Of all samples, whether or not the profile stores them."""
    encode_seconds: Figure
    """In the training of each strategy; nothing where they are stored."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The whole: every stage, the sums, filtering on several machines, and what is worth knowing in sentences."""

    profile: str
    rows: Figure
    parts: Figure
    samples: Figure
    """Samples in shards."""
    epochs: Figure
    """Times that training sees each sample."""
    stages: tuple[StageEstimate, ...]
    filtering: tuple[FilteringEstimate, ...]
    text: TextEstimate
    training_memory_bytes: Figure
    """Of one process: weights, gradients, optimizer state and moving average, without activations."""
    notes: tuple[str, ...] = ()

    def totals(self) -> dict[str, Figure]:
        """Return the sums over the stages shown, of what is known."""
        return {
            "seconds": total([stage.seconds for stage in self.stages]),
            "gpu_seconds": total([stage.gpu_seconds for stage in self.stages]),
            "requests": total([stage.requests for stage in self.stages]),
            "bytes_out": total([stage.bytes_out for stage in self.stages]),
            "scratch_bytes": largest(ZERO, *(stage.scratch_bytes for stage in self.stages)),
        }

    def unknown(self) -> list[str]:
        """Return the stages whose time is not known and so not in the sum."""
        return [stage.name for stage in self.stages if not stage.seconds.is_known]


def estimate(inputs: Inputs, stages: tuple[str, ...] = STAGES) -> Estimate:
    """Return the estimate of a profile; `stages` are those to show, rows flow through all of them."""
    return _Estimator(inputs).result(stages)


class _Estimator:
    """Follows the rows from the metadata to the scores."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.profile = inputs, inputs.profile
        self.rows = self._rows()
        self.parts = (self.rows / inputs.assumed("part_rows")).rounded_up()
        self.kept = self.rows * passed_share(inputs)
        self.fetched = self.kept * self._fetched_share()
        self.captioned = self.fetched * inputs.assumed("captioned_share")
        self.samples = self.captioned * inputs.assumed("shard_share")
        self.trained = self.samples * (1 - inputs.of_profile("dataset.validation_share"))
        self.models = ModelEstimator(inputs)

    def result(self, wanted: tuple[str, ...]) -> Estimate:
        data = [self._subset(), self._images(), self._captions(), self._shards(), self._latents()]
        evaluation = [self._samples(), self._scores()]
        found = [*data, self._text_features(), *self._checkpoints(), *evaluation]
        result = Estimate(
            profile=self.profile.name,
            rows=self.rows,
            parts=self.parts,
            samples=self.samples,
            epochs=self._samples_seen() / self.trained,
            stages=tuple(stage for stage in found if stage.stage in wanted),
            filtering=tuple(self._filtering(nodes) for nodes in _FILTERING_NODES),
            text=self._text(),
            training_memory_bytes=self._training_memory(),
        )
        return replace(result, notes=tuple(notes_of(self.inputs, result)))

    def _rows(self) -> Figure:
        known = "rows" in self.inputs.chosen or "rows" in self.inputs.measured
        if self.profile.world is not None and not known:
            return self.inputs.of_profile("world.num_images")
        return self.inputs.assumed("rows")

    def _fetched_share(self) -> Figure:
        alive, good = 1 - self.inputs.assumed("dead_link_share"), 1 - self.inputs.assumed("bad_image_share")
        return self.inputs.derived("fetched_share", alive * good)

    def _runs_at_once(self, stage: str, partitions: Figure) -> Figure:
        """Return how many processes of a stage work side by side."""
        per_run = self.inputs.implied(self.profile.partitions_per_run(stage), f"batches.{stage}")
        return smallest(self.inputs.assumed("parallel_runs"), (partitions / per_run).rounded_up())

    def _nodes_of(self, gpus: Figure) -> Figure:
        """Return the machines that so many GPUs fill; one where none are used."""
        if not gpus.is_known or gpus.value == 0:
            return Figure(1.0, gpus.inputs)
        own = self.profile.needs.num_gpus
        per_node = self.inputs.of_profile("needs.num_gpus") if own else self.inputs.assumed("gpus_per_node")
        return (gpus / per_node).rounded_up()

    # Data

    def _subset(self) -> StageEstimate:
        processes = self._runs_at_once("laion_subset", self.parts)
        return StageEstimate(
            stage="laion_subset",
            rows_in=self.rows,
            rows_out=self.kept,
            bytes_in=self.rows * self.inputs.assumed("metadata_row_bytes"),
            bytes_out=self.kept * self.inputs.assumed("subset_row_bytes"),
            seconds=self.rows / (self.inputs.assumed("filter_rows_per_second") * processes),
            nodes=processes,
            limit="one process",
        )

    def _image_row_bytes(self) -> Figure:
        size_px = self.inputs.of_profile("images.transform.size_px")
        jpeg = size_px * size_px * self.inputs.assumed("jpeg_bytes_per_px")
        return self.inputs.derived("image_row_bytes", jpeg + self.inputs.assumed("subset_row_bytes"))

    def _images(self) -> StageEstimate:
        assumed, of_profile = self.inputs.assumed, self.inputs.of_profile
        answered = self.kept * (1 - assumed("dead_link_share"))
        requests = self.kept * (1 + assumed("retry_share")) if self.profile.images.fetch.retries else self.kept
        received = answered * assumed("mean_image_bytes")
        nodes = self._runs_at_once("images", self.parts)
        cores, connections = assumed("cores_per_node"), of_profile("images.fetch.total_connections")
        if self.profile.images.workers.ray_address is None:
            cores = smallest(of_profile("images.decode_workers"), cores)
        else:  # a process for each shard, as many as a node has room for
            connections = connections * (cores / of_profile("images.workers.cpus_per_unit"))
        times = {
            "network": received * _BITS_PER_MEGABIT_BYTE / assumed("network_mbit"),
            "connections": requests * assumed("request_seconds") / connections,
            "decoding": answered / (assumed("decode_images_per_second") * cores),
        }
        limit = max(times, key=lambda name: times[name].value)
        measured_rate = assumed("fetch_rows_per_second")
        seconds = self.kept / measured_rate if measured_rate.is_known else largest(*times.values())
        return StageEstimate(
            stage="images",
            rows_in=self.kept,
            rows_out=self.fetched,
            bytes_in=received,
            bytes_out=self.fetched * self._image_row_bytes() + self.kept * assumed("row_bytes"),
            requests=requests,
            seconds=seconds / nodes,
            nodes=nodes,
            limit="as measured" if measured_rate.is_known else limit,
        )

    def _captions(self) -> StageEstimate:
        pool = self.models.pool("captions")
        per_second = self.inputs.assumed("captions_per_second")
        seconds = self.fetched / per_second if per_second.is_known else self.fetched * self.models.caption_seconds(pool)
        return StageEstimate(
            stage="captions",
            rows_in=self.fetched,
            rows_out=self.captioned,
            bytes_in=self.fetched * self._image_row_bytes(),
            bytes_out=self.captioned * (self.models.caption_bytes() + self.inputs.assumed("row_bytes")),
            requests=self.fetched,
            seconds=seconds,
            nodes=self._nodes_of(pool.gpus),
            gpus=pool.gpus,
            limit="as measured" if per_second.is_known else "captioner",
        )

    def _sample_bytes(self) -> Figure:
        together = self._image_row_bytes() + self.inputs.assumed("shard_extra_bytes")
        return self.inputs.derived("shard_sample_bytes", together)

    def _shards(self) -> StageEstimate:
        processes = self._runs_at_once("shards", self.parts)
        return StageEstimate(
            stage="shards",
            rows_in=self.captioned,
            rows_out=self.samples,
            bytes_in=self.captioned * (self._image_row_bytes() + self.models.caption_bytes()),
            bytes_out=self.samples * self._sample_bytes(),
            seconds=self.captioned / (self.inputs.assumed("shard_samples_per_second") * processes),
            nodes=processes,
            limit="one process",
        )

    def _latents(self) -> StageEstimate:
        processes = self._runs_at_once("latents", self.parts)
        on_gpu = self.profile.latents.device != "cpu"
        gpus = processes if on_gpu else ZERO
        rate = self.inputs.derived("latents_per_second", self.models.latents_per_second(on_gpu)) * processes
        return StageEstimate(
            stage="latents",
            rows_in=self.samples,
            rows_out=self.samples,
            bytes_in=self.samples * self._sample_bytes(),
            bytes_out=self.samples * self.models.latent_bytes(),
            seconds=self.samples / rate,
            nodes=self._nodes_of(gpus) if on_gpu else processes,
            gpus=gpus,
            limit=_where("autoencoder", on_gpu),
        )

    def _text_features(self) -> StageEstimate:
        settings = self.profile.text_features
        if settings is None:
            none = self.inputs.implied(0, "text_features")
            return StageEstimate(
                stage="text_features", rows_in=none, rows_out=none, bytes_in=none, bytes_out=none, seconds=none,
                nodes=none, limit="not stored",
            )  # fmt: skip
        processes = self._runs_at_once("text_features", self.parts)
        on_gpu = settings.device != "cpu"
        gpus = processes if on_gpu else ZERO
        rate = self.inputs.derived("text_features_per_second", self.models.texts_per_second(on_gpu)) * processes
        return StageEstimate(
            stage="text_features",
            rows_in=self.samples,
            rows_out=self.samples,
            bytes_in=self.samples * self._sample_bytes(),
            bytes_out=self.samples * self.models.text_bytes(),
            seconds=self.samples / rate,
            nodes=self._nodes_of(gpus) if on_gpu else processes,
            gpus=gpus,
            limit=_where("text encoder", on_gpu),
        )

    def _text(self) -> TextEstimate:
        sample_bytes = self.models.text_bytes()
        stored = self.samples * sample_bytes
        if self.profile.text_features is not None:
            none = self.inputs.implied(0, "text_features")
            return TextEstimate(
                is_stored=True, sample_bytes=sample_bytes, stored_bytes=stored, encode_seconds=none,
            )  # fmt: skip
        rate = self.models.texts_per_second(on_gpu=self.profile.training.device == "cuda") * self._processes()
        return TextEstimate(
            is_stored=False,
            sample_bytes=sample_bytes,
            stored_bytes=stored,
            # As they are drawn; what `text_memory_bytes` keeps is little of a set that is worth the question.
            encode_seconds=self._samples_seen() / rate,
        )

    # Training

    def _training_gpus(self) -> Figure:
        return self._processes() if self.profile.training.device == "cuda" else ZERO

    def _processes(self) -> Figure:
        own = self.inputs.of_profile("training.num_processes")
        return self.inputs.derived("gpus", own) if self.profile.training.device == "cuda" else own

    def _samples_seen(self) -> Figure:
        return self.inputs.of_profile("training.steps") * self.inputs.of_profile("training.batch_size")

    def _checkpoints(self) -> list[StageEstimate]:
        text, gpus = self._text(), self._training_gpus()
        seen = self._samples_seen()
        sample_bytes = self.models.latent_bytes() + (text.sample_bytes if text.is_stored else ZERO)
        found = []
        for strategy, parameters in self.inputs.facts.parameters.items():
            weights = self.inputs.implied(4 * parameters, "model")
            flops = self.models.training_flops(strategy) * self.inputs.of_profile("training.steps")
            seconds = flops / (self.models.training_rate() * self._processes())
            found.append(
                StageEstimate(
                    stage="checkpoint",
                    partition=strategy.value,
                    rows_in=smallest(self.trained, seen),
                    rows_out=seen,
                    bytes_in=seen * sample_bytes,
                    bytes_out=weights,
                    seconds=seconds + text.encode_seconds,
                    nodes=self._nodes_of(gpus),
                    gpus=gpus,
                    scratch_bytes=4 * weights * self._snapshots(),
                    limit=_where("steps", gpus.value > 0),
                )
            )
        return found

    def _snapshots(self) -> Figure:
        """Return the snapshots that lie side by side at worst: those kept, and one being written."""
        newest = self.inputs.of_profile("training.keep_checkpoints") + 1
        if self.profile.training.keep_every is None:
            return newest
        return newest + self.inputs.of_profile("training.steps") / self.inputs.of_profile("training.keep_every")

    def _training_memory(self) -> Figure:
        """Weights, gradients, two moments and the average in float32 (the average is the first process's)."""
        most = max(self.inputs.facts.parameters.values(), default=0)
        whole = self.inputs.implied(5 * 4 * most, "model")
        return whole / self._processes() if self.profile.training.sharded else whole

    # Evaluation

    def _num_images(self, benchmark: str) -> Figure:
        """Return the images of one arm."""
        prompts = self.inputs.facts.prompts.get(benchmark, float("nan"))
        per_prompt = self.inputs.of_profile(f"samples.images_per_prompt.{benchmark}")
        return self.inputs.implied(prompts, f"prompt_sets ({benchmark})") * per_prompt

    def _samples(self) -> StageEstimate:
        benchmarks, arms = self.profile.benchmarks, self.inputs.implied(len(self.profile.arms), "arms")
        images = sum((self._num_images(name) for name in benchmarks), ZERO)
        partitions = arms * len(benchmarks)
        processes = self._runs_at_once("samples", partitions)
        on_gpu = self.profile.samples.device == "cuda"
        rate = self.inputs.assumed("samples_per_second")
        one_of_each_arm = 1 / rate * len(self.profile.arms) if rate.is_known else self.models.drawing_seconds(on_gpu)
        gpus = processes if on_gpu else ZERO
        size_px = self._drawn_px()
        return StageEstimate(
            stage="samples",
            rows_in=arms * sum((self._num_images(name) / self._per_prompt(name) for name in benchmarks), ZERO),
            rows_out=arms * images,
            bytes_in=ZERO,
            bytes_out=arms * images * size_px * size_px * self.inputs.assumed("png_bytes_per_px"),
            seconds=images * one_of_each_arm / processes,
            nodes=self._nodes_of(gpus) if on_gpu else processes,
            gpus=gpus,
            limit=_where("sampling", on_gpu),
        )

    def _per_prompt(self, benchmark: str) -> Figure:
        return self.inputs.of_profile(f"samples.images_per_prompt.{benchmark}")

    def _drawn_px(self) -> Figure:
        return self.inputs.of_profile("model.latent_size") * AUTOENCODER_FACTOR

    def _scores(self) -> StageEstimate:
        arms = self.inputs.implied(len(self.profile.arms), "arms")
        answers, seconds, images = ZERO, ZERO, ZERO
        pools = []
        for benchmark in self.profile.benchmarks:
            pools.append(self.models.judge_pool(benchmark))
            judged = arms * self._num_images(benchmark)
            asked = judged * (self.inputs.assumed("questions_per_image") if benchmark == "geneval" else Figure(1.0))
            rate = self.inputs.assumed("answers_per_second")
            each = 1 / rate if rate.is_known else self.models.answer_seconds(benchmark, pools[-1])
            images, answers, seconds = images + judged, answers + asked, seconds + asked * each
        gpus = largest(*(pool.gpus for pool in pools))
        size_px = self._drawn_px()
        return StageEstimate(
            stage="scores",
            rows_in=images,
            rows_out=images,
            bytes_in=images * size_px * size_px * self.inputs.assumed("png_bytes_per_px"),
            bytes_out=answers * self.inputs.assumed("row_bytes"),
            requests=answers,
            seconds=seconds,
            nodes=self._nodes_of(gpus),
            gpus=gpus,
            limit="judges",
        )

    # Filtering on several machines

    def _filtering(self, nodes: int) -> FilteringEstimate:
        """Parts are dealt out whole; what memory or cores allow runs side by side, then one process compares all."""
        assumed = self.inputs.assumed
        part_rows = smallest(assumed("part_rows"), self.rows)
        part_memory = assumed("filter_base_bytes") + assumed("filter_bytes_per_row") * part_rows
        room = self.inputs.of_profile("needs.memory_gib") * _GIB / part_memory
        own = (self.parts / nodes).rounded_up()
        processes = largest(Figure(1.0), smallest(assumed("cores_per_node"), room - room.value % 1, own))
        waves = (self.parts / (processes * nodes)).rounded_up()
        selection = self.kept / assumed("selection_rows_per_second")
        return FilteringEstimate(
            nodes=nodes,
            processes=processes,
            seconds=waves * part_rows / assumed("filter_rows_per_second") + selection,
            selection_seconds=selection,
            memory_bytes=processes * part_memory,
        )


def _where(work: str, on_gpu: bool) -> str:
    return work if on_gpu else f"{work}, on CPU"


def estimate_json(result: Estimate, inputs: Inputs) -> dict[str, Any]:
    """Return the estimate as JSON: every figure with its basis and inputs, then the assumptions and measurements."""
    from orchestration.cost.assumptions import reasons

    def plain(value: Any) -> Any:
        if isinstance(value, Figure):
            return value.as_json()
        if is_dataclass(value):
            return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    why = reasons()
    stages = [plain(stage) | {"name": stage.name, "gpu_seconds": plain(stage.gpu_seconds)} for stage in result.stages]
    return plain(result) | {
        "stages": stages,
        "totals": {name: plain(figure) for name, figure in result.totals().items()},
        "not_in_totals": result.unknown(),
        "assumptions": {
            name: {"value": value, "set": name in inputs.chosen, "reason": why[name]}
            for name, value in inputs.assumptions.model_dump().items()
        },
        "measured": {name: plain(item) for name, item in sorted(inputs.measured.items())},
    }
