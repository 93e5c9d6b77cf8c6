"""Small finished lineages for the evaluation tests: real files with real manifests, made by stand-in stages."""

import hashlib
import io
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from evaluation.benchmarks.prompt_files import scan_prompt_file
from evaluation.benchmarks.prompt_sets import STAGE as PROMPT_SETS
from evaluation.config import PromptSetsConfig
from pipelines.core.config import FrozenConfig, ModelRef
from pipelines.core.model_prompts import NO, YES, unified_reward_answer
from pipelines.core.sample_key import sample_key
from pipelines.runner.outputs import StageOutput
from pipelines.runner.units import StageResult, StageRun
from recaption.config import OpenAIEngineConfig
from recaption.engine import VisionAnswer, VisionRequest
from tests.plain_stage import plain_stage
from training.config import ModelConfig, Strategy
from training.models.saved_model import ConditioningRecord, write_conditioning

JUDGE = OpenAIEngineConfig(model=ModelRef(id="test/judge", revision="sha256:0123456789abcdef"))
ENCODER = ModelRef(id="test/encoder", revision="sha256:feed")
TINY_MODEL = ModelConfig(
    hidden_size=32, num_blocks=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64, latent_channels=4,
    latent_size=8, text_width=48, num_text_layers=4, fuse_first_layer=1, gate_width=16, gate_embedding_size=8,
)  # fmt: skip
"""Fits tests.tiny_models.write_causal_lm and write_autoencoder."""

GENEVAL_LINES = (
    {"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a photo of a star"},
    {"tag": "two_object", "include": [{"class": "star", "count": 1}, {"class": "fish", "count": 1}],
     "prompt": "a photo of a star and a fish"},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}],
     "prompt": "a photo of two cats"},
    {"tag": "colors", "include": [{"class": "apple", "count": 1, "color": "red"}], "prompt": "a photo of a red apple"},
    {"tag": "position", "include": [{"class": "dog", "count": 1},
     {"class": "cat", "count": 1, "position": ["left of", 0]}], "prompt": "a photo of a cat left of a dog"},
    {"tag": "color_attr", "include": [{"class": "car", "count": 1, "color": "blue"},
     {"class": "star", "count": 1, "color": "yellow"}], "prompt": "a photo of a blue car and a yellow star"},
)  # fmt: skip

GENAI_PROMPTS = (
    "a red apple on grass", "two cats in the night sky", "a star to the left of a fish", "no dog, only a cat on sand",
    "every star is yellow", "more cats than dogs on snow", "a blue car that is not like the other cars",
)  # fmt: skip
GENAI_SKILLS = {
    "basic": [0, 2], "advanced": [1, 3, 4, 5], "attribute": [0], "scene": [0], "spatial relation": [2],
    "counting": [1], "negation": [3], "universal": ["4"], "comparison": [5],
}  # fmt: skip
DRAWBENCH_ROWS = (("A red car.", "Colors"), ('A sign that says "hi, you".', "Text "), ("Three cats.", "Counting"))


def write_prompt_files(folder: Path, repeats: int = 1) -> PromptSetsConfig:
    """Write small prompt files in the three published formats, with all prompts `repeats` times."""
    folder.mkdir(parents=True, exist_ok=True)
    geneval, image, skills, drawbench = (
        folder / name
        for name in ("evaluation_metadata.jsonl", "genai_image.json", "genai_skills.json", "DrawBench.csv")
    )
    geneval.write_text("".join(json.dumps(line) + "\n" for line in GENEVAL_LINES * repeats))
    prompts = GENAI_PROMPTS * repeats
    entries = {
        f"{i:05d}": {"id": f"{i:05d}", "prompt": prompt, "models": {"X": [5, 5, 5]}} for i, prompt in enumerate(prompts)
    }
    image.write_text(json.dumps(entries, indent=4))
    count = len(GENAI_PROMPTS)
    skills.write_text(
        json.dumps(
            {name: [int(i) + count * r for r in range(repeats) for i in ids] for name, ids in GENAI_SKILLS.items()}
        )
    )
    lines = [f'"{prompt.replace(chr(34), chr(34) * 2)}",{category}' for prompt, category in DRAWBENCH_ROWS * repeats]
    drawbench.write_bytes(("Prompts,Category\r\n" + "\r\n".join(lines) + "\r\n").encode())
    return PromptSetsConfig(
        geneval=scan_prompt_file(geneval),
        genai_image=scan_prompt_file(image),
        genai_skills=scan_prompt_file(skills),
        drawbench=scan_prompt_file(drawbench),
    )


def draw_image(seed: str, size_px: int = 64) -> Image.Image:
    """Draw random shapes that depend only on `seed`."""
    rng = random.Random(seed)
    image = Image.new("RGB", (size_px, size_px), tuple(rng.randrange(140, 255) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randrange(1, 5)):
        x, y = rng.randrange(size_px * 3 // 4), rng.randrange(size_px * 3 // 4)
        box = (x, y, x + size_px // 4, y + size_px // 4)
        draw_shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        draw_shape(box, fill=tuple(rng.randrange(0, 200) for _ in range(3)))
    return image


def encode_image(image: Image.Image, image_format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format)
    return stream.getvalue()


class ScriptedPool:
    """A judge that answers with a function of the request, in place of engines on Ray; counts its batches."""

    def __init__(self, answer: Callable[[VisionRequest], VisionAnswer]) -> None:
        self._answer = answer
        self.num_batches = 0

    def start(self) -> None:
        pass

    def answer(
        self, batches: Iterable[tuple[Any, Sequence[VisionRequest]]]
    ) -> Iterator[tuple[Any, list[VisionAnswer]]]:
        for key, requests in batches:
            self.num_batches += 1
            yield key, [self._answer(request) for request in requests]


@contextmanager
def use_judge(judge: ScriptedPool) -> Iterator[ScriptedPool]:
    """Use `judge` in place of the engines of all judging stages."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("evaluation.judging.scores", "evaluation.judging.calibration"):
            patch.setattr(f"{module}.engine_pool", lambda *_: judge)
        yield judge


def plausible_answer(request: VisionRequest) -> VisionAnswer:
    """Answer like a judge, pseudo-randomly by digest of image and text; one rating in seven has no Style."""
    digest = hashlib.sha256(request.image_bytes + request.text.encode()).digest()
    chance = digest[0] / 255
    if request.want_logprobs_of:
        yes = min(max(chance, 0.01), 0.99)
        return VisionAnswer(
            text=YES if yes > 0.5 else NO, finish_reason="length", num_prompt_tokens=90, num_answer_tokens=1,
            logprobs={YES: math.log(yes), NO: math.log(1 - yes)},
        )  # fmt: skip
    text = unified_reward_answer(1 + 4 * chance, 1 + 4 * digest[1] / 255, 1 + 4 * digest[2] / 255)
    if digest[3] % 7 == 0:
        text = text.replace("Style Score (1-5): ", "Style Score (1-5): nan #")
    return VisionAnswer(text=text, finish_reason="stop", num_prompt_tokens=200, num_answer_tokens=30)


class StandInConfig(FrozenConfig):
    """Configuration of a stand-in stage."""

    salt: str = ""
    text_encoder: ModelRef | None = None


def run_stand_in(
    root: Path,
    name: str,
    produce: Callable[[StageRun[StandInConfig]], StageResult | None],
    inputs: Mapping[str, Sequence[StageOutput]] | None = None,
    partition: str | None = None,
    config: StandInConfig | None = None,
) -> StageOutput:
    """Run a stage with the given name and `produce` function."""
    stage = plain_stage(name=name, code_version="1", config_type=StandInConfig, produce=produce)
    return stage.run(config or StandInConfig(), inputs or {}, root, partition)


def write_samples(
    root: Path,
    arm: str,
    benchmark: str,
    prompts: StageOutput,
    checkpoint: StageOutput | None = None,
    per_prompt: int = 1,
) -> StageOutput:
    """Write samples of an arm: images that depend on arm, prompt and index."""

    def produce(run: StageRun[StandInConfig]) -> StageResult:
        rows = []
        with run.unit("samples") as unit:
            for row in pq.read_table(prompts.path("prompts.parquet")).to_pylist():
                for index in range(per_prompt if row["benchmark"] == benchmark else 0):
                    path, data = (
                        f"images/{row['prompt_id']}-{index}.png",
                        encode_image(draw_image(f"{arm}{row['prompt']}{index}")),
                    )
                    unit.write(path, data)
                    rows.append({"prompt_id": row["prompt_id"], "sample_index": index, "path": path,
                                 "sha256": hashlib.sha256(data).hexdigest(), "prompt": row["prompt"]})  # fmt: skip
            with unit.open("samples.parquet", num_rows=len(rows)) as stream:
                pq.write_table(pa.Table.from_pylist(rows), stream)
            unit.account(rows_in=len(rows), rows_out=len(rows))
        return StageResult(summary={"num_images": len(rows)})

    inputs = {"prompt_sets": [prompts], **({"checkpoint": [checkpoint]} if checkpoint else {})}
    return run_stand_in(root, "samples", produce, inputs, f"{arm}|{benchmark}")


def write_checkpoint(
    root: Path,
    strategy: Strategy,
    inputs: Mapping[str, Sequence[StageOutput]],
    config: ModelConfig = TINY_MODEL,
    steps: int = 300,
    text_encoder: ModelRef = ENCODER,
    autoencoder: ModelRef = ENCODER,
) -> StageOutput:
    """Write a checkpoint of a small model, with weights perturbed from their initialisation."""
    import torch
    from safetensors.torch import save

    from training.models.build import build_model

    generator = torch.Generator().manual_seed(7)
    model = build_model(config, strategy)
    weights = {}
    for name, tensor in model.state_dict().items():
        size = 0.4 if name.startswith("fusion.") else 0.05
        weights[name] = (tensor + size * torch.randn(tensor.shape, generator=generator)).contiguous()
    chance, bias = random.Random(1), random.Random(strategy.value).uniform(-0.02, 0.02)
    metrics = []
    for step in range(steps):
        loss = 0.45 + 0.6 * math.exp(-step / 60) + chance.gauss(0, 0.04) + bias * step / steps
        metrics.append({"step": step, "loss": loss, "grad_norm": 1.0, "learning_rate": 1e-4})
    metrics[-1]["validation_loss"] = metrics[-1]["loss"]

    conditioning = ConditioningRecord(
        strategy=strategy,
        text_encoder_id=text_encoder.id,
        text_encoder_revision=text_encoder.revision,
        template_version="plain-1",
        autoencoder_id=autoencoder.id,
        autoencoder_revision=autoencoder.revision,
        autoencoder_subfolder=None,
        scaling_factor=1.5,
        shift_factor=0.06,
    )

    def produce(run: StageRun[StandInConfig]) -> StageResult:
        with run.unit("model") as unit:
            unit.write("model.safetensors", save(weights))
            unit.write("conditioning.json", write_conditioning(conditioning))
            unit.write("config.json", config.model_dump_json().encode())
            unit.write("metrics.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in metrics))
        summary = {"strategy": strategy.value, "consumption_digest": "abcdef0123456789" * 2, "num_samples_seen": 9600,
                   "num_distinct_samples": 480, "num_parameters": sum(w.numel() for w in weights.values()),
                   "steps": steps, "first_loss": metrics[0]["loss"], "final_loss": metrics[-1]["loss"],
                   "validation_loss": metrics[-1]["loss"]}  # fmt: skip
        return StageResult(summary=summary)

    return run_stand_in(root, "checkpoint", produce, inputs, strategy.value, StandInConfig(text_encoder=text_encoder))


@dataclass
class DataWorld:
    """Finished data stages of two parts."""

    subset: list[StageOutput] = field(default_factory=list)
    images: list[StageOutput] = field(default_factory=list)
    captions: list[StageOutput] = field(default_factory=list)
    shards: list[StageOutput] = field(default_factory=list)


def _counted(
    name: str, rows_in: int, drops: Sequence[str], tables: Mapping[str, list[dict[str, Any]]] | None = None
) -> Any:
    def produce(run: StageRun[StandInConfig]) -> StageResult:
        with run.unit("00000") as unit:
            for path, rows in (tables or {}).items():
                with unit.open(path, num_rows=len(rows)) as stream:
                    pq.write_table(pa.Table.from_pylist(rows), stream)
            for number, reason in enumerate(drops):
                unit.drop(f"{name}-{number}", reason)
            unit.account(rows_in=rows_in, rows_out=rows_in - len(drops))
        return StageResult(summary={"prompt": "Describe <this> image."} if name == "captions" else {})

    return produce


def write_data(root: Path, num_images: int = 12) -> tuple[DataWorld, StageOutput]:
    """Write subset, images, captions and shards of two parts, and the dataset over them."""
    world = DataWorld()
    for part in ("00000", "00001"):
        keys = [sample_key(f"http://web/{part}/{n}", f"alt {n}") for n in range(num_images)]
        image_rows = [
            {
                "sample_key": key,
                "alt_text": f"IMG_{n} <b>& friends</b>",
                "image": encode_image(draw_image(key, 128), "JPEG"),
            }
            for n, key in enumerate(keys)
        ]
        captions = [
            {"sample_key": key, "caption": f"a drawn scene number {n}, with “shapes”"} for n, key in enumerate(keys)
        ]
        rows = num_images + 8
        world.subset.append(
            run_stand_in(
                root,
                "laion_subset",
                _counted("laion_subset", rows + 6, ["low_similarity"] * 4 + ["nsfw"] * 2),
                {},
                part,
            )
        )
        images = _counted(
            "images", rows, ["http_404"] * 5 + ["opt_out"] * 2 + ["timeout"], {"images-00000.parquet": image_rows}
        )
        world.images.append(run_stand_in(root, "images", images, {"subset": world.subset[-1:]}, part))
        captioned = _counted("captions", num_images, [], {"captions-00000.parquet": captions})
        world.captions.append(run_stand_in(root, "captions", captioned, {"images": world.images[-1:]}, part))
        shards = _counted("shards", num_images, ["caption_truncated"])
        inputs = {"images": world.images[-1:], "captions": world.captions[-1:]}
        world.shards.append(run_stand_in(root, "shards", shards, inputs, part))
    num_pairs = 2 * (num_images - 1)
    dataset = run_stand_in(root, "dataset", _counted("dataset", num_pairs, ["duplicate_key"]), {"shards": world.shards})
    return world, dataset


def write_prompt_sets(root: Path, repeats: int = 1) -> StageOutput:
    """Run the stage prompt_sets on small files."""
    return PROMPT_SETS.run(write_prompt_files(root / "files", repeats), {}, root)
