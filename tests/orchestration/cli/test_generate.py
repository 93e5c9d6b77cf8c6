"""`throughline generate` and `export` on tiny checkpoints: selection, written files, refusals."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestration.cli.generate import METADATA_KEY
from orchestration.cli.main import main
from orchestration.defs.metadata import describe
from orchestration.graph.nodes import GRAPH
from orchestration.graph.resolution import Task
from orchestration.lineage.audit import Auditor
from orchestration.profiles.loading import load_profile
from pipelines.core.config import ModelRef
from tests.tiny_models import write_autoencoder, write_causal_lm
from tests.training.checkpoints import write_checkpoint
from tests.training.conftest import NUM_LAYERS
from training.config import SamplerConfig, Strategy
from training.sampling.sampler import load_sampler

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return write_causal_lm(tmp_path_factory.mktemp("llm"), num_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return write_autoencoder(tmp_path_factory.mktemp("vae"))


class Home:
    """A home folder with a profile file for tiny models."""

    def __init__(self, folder: Path, llm: ModelRef, autoencoder: ModelRef) -> None:
        self.folder, self.outputs, self.llm, self.autoencoder = folder, folder / "outputs", llm, autoencoder
        self.profile = folder / "tiny.json"
        self.write_profile(llm, autoencoder)

    def write_profile(self, llm: ModelRef, autoencoder: ModelRef) -> None:
        encoder, decoder = llm.model_dump(), autoencoder.model_dump()
        sampler = {"num_steps": 2, "guidance_scale": 2.0}
        changes = {
            "base": "demo",
            "text_encoder": encoder,
            "autoencoder": decoder,
            "latents": {"autoencoder": decoder},
            "text_features": {"text_encoder": encoder},
            "samples": {"text_encoder": encoder, "autoencoder": decoder, "sampler": sampler, "threads": 1},
        }
        self.profile.write_text(json.dumps(changes))

    def call(self, command: str, *arguments: str) -> object:
        with pytest.raises(SystemExit) as caught:
            main([command, "--profile", str(self.profile), *arguments])
        return caught.value.code

    def generate(self, *arguments: str) -> object:
        return self.call("generate", *arguments)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llm: ModelRef, autoencoder: ModelRef) -> Home:
    monkeypatch.setenv("THROUGHLINE_HOME", str(tmp_path))
    return Home(tmp_path, llm, autoencoder)


def _metadata(path: Path) -> dict[str, object]:
    image = Image.open(path)
    assert isinstance(image, Image.Image)
    return json.loads(image.text[METADATA_KEY])  # type: ignore[attr-defined]


def test_the_newest_checkpoint_generates_the_samplers_images(home: Home) -> None:
    old = write_checkpoint(home.outputs, Strategy.DEPTH_WISE, home.llm, home.autoencoder)
    new = write_checkpoint(home.outputs, Strategy.DEPTH_WISE, home.llm, home.autoencoder, code_version="2")
    assert old.data_version != new.data_version
    stamped = new.manifest.model_copy(
        update={"environment": new.manifest.environment.model_copy(update={"ended_at": "2999-01-01T00:00:00+00:00"})}  # type: ignore[union-attr]
    )
    stamped.write(new.folder)
    out = home.folder / "images" / "dog.png"
    assert home.generate("a red dog", "--strategy", "depth_wise", "--seed", "5", "--out", str(out)) == 0
    metadata = _metadata(out)
    assert metadata["checkpoint"] == new.data_version
    assert (metadata["prompt"], metadata["seed"], metadata["arm"]) == ("a red dog", 5, "depth_wise")
    settings = SamplerConfig.model_validate(metadata["settings"])
    assert (settings.num_steps, settings.guidance_scale) == (2, 2.0)
    assert os.sep not in json.dumps(metadata)
    (expected,) = load_sampler(new, home.llm, home.autoencoder).generate(["a red dog"], [0], 5, settings)
    assert np.array_equal(np.array(Image.open(out)), np.array(expected))


def test_several_images_are_separate_files_of_the_requested_size(home: Home) -> None:
    checkpoint = write_checkpoint(home.outputs, Strategy.FUSE_DIT, home.llm, home.autoencoder)
    out = home.folder / "x.png"
    arguments = ("--checkpoint", str(checkpoint.folder), "--num-images", "2", "--size", "48", "--out", str(out))
    assert home.generate("a dog", *arguments) == 0
    images = [np.array(Image.open(home.folder / f"x-{index}.png")) for index in range(2)]
    assert [image.shape for image in images] == [(48, 48, 3)] * 2
    assert not np.array_equal(*images)
    assert _metadata(home.folder / "x-1.png")["sample_index"] == 1
    assert home.generate("a dog", *arguments, "--negative-prompt", "a blue house") == 0
    assert not np.array_equal(np.array(Image.open(home.folder / "x-0.png")), images[0])


def test_several_strategies_are_one_grid(home: Home) -> None:
    for strategy in (Strategy.UNIFORM, Strategy.JOINT):
        write_checkpoint(home.outputs, strategy, home.llm, home.autoencoder)
    out = home.folder / "grid.png"
    arguments = ("--strategy", "uniform", "--strategy", "joint", "--strategy", "joint+shift", "--out", str(out))
    assert home.generate("a dog on a long, long, long table", *arguments) == 0
    assert [cell["arm"] for cell in _metadata(out)["grid"]] == ["uniform", "joint", "joint+shift"]  # type: ignore[attr-defined]
    assert Image.open(out).size == (3 * 32 + 4 * 8, 32 + 2 * 8 + 2 * 28)
    message = home.generate("a dog", "--strategy", "all", "--out", str(out))
    assert message == (
        f"error: no finished checkpoint of penultimate in {home.outputs}; train one with "
        f"`throughline run --profile {home.profile} --select +checkpoint`"
    )


def test_a_request_that_cannot_be_generated_is_one_sentence(home: Home) -> None:
    checkpoint = write_checkpoint(home.outputs, Strategy.STATIC, home.llm, home.autoencoder)
    common = ("--strategy", "static", "--out", str(home.folder / "x.png"))
    refusals = {
        ("a dog", *common, "--size", "44"): "error: --size 44: expected a multiple of 8 px (the autoencoder's 4 times",
        ("dog " * 600, *common): "tokens long with its template, the text encoder's limit is 512; shorten it",
        ("a dog", *common, "--steps", "0"): "num_steps: Input should be greater than 0",
        ("a dog", *common, "--num-images", "0"): "error: --num-images 0: expected 1 or more",
        ("a dog", *common[:3], str(home.folder / "x.jpg")): "x.jpg: images are written as PNG; choose a name",
        ("a dog", *common[:3], str(home.folder / "x")): "/x: images are written as PNG; choose a name",
        ("a dog", "--strategy", "deep", *common[2:]): "error: no strategy 'deep'; known: penultimate, uniform",
        ("a dog", "--strategy", "static+shift", *common[2:]): "the shift of Eq. 11 needs a time gate",
        ("a dog", *common[2:]): "error: name a strategy with --strategy",
        ("a dog", "--checkpoint", str(home.folder), *common[2:]): "no manifest here",
    }
    for arguments, expected in refusals.items():
        message = home.generate(*arguments)
        assert isinstance(message, str) and expected in message and "\n" not in message
    home.write_profile(home.llm, home.autoencoder.model_copy(update={"revision": "sha256:other"}))
    message = home.generate("a dog", *common)
    assert isinstance(message, str) and "given tiny-vae at sha256:other; use the former" in message
    assert not list(home.folder.glob("x*"))
    (checkpoint.folder / "model.safetensors").write_bytes(b"short")
    message = home.generate("a dog", *common)
    assert isinstance(message, str) and "model.safetensors: 5 bytes, manifest says" in message


def test_export_writes_the_pipeline_of_the_newest_checkpoint(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    out = home.folder / "export"
    message = home.call("export", "--strategy", "uniform", "--out", str(out))
    assert isinstance(message, str) and "no finished checkpoint of uniform" in message
    checkpoint = write_checkpoint(home.outputs, Strategy.UNIFORM, home.llm, home.autoencoder)
    assert home.call("export", "--strategy", "uniform", "--out", str(out)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    index = json.loads((out / "model_index.json").read_text())
    assert index["lineage"]["checkpoint"] == checkpoint.data_version
    assert (index["num_inference_steps"], index["guidance_scale"]) == (2, 2.0)
    message = home.call("export", "--strategy", "uniform", "--out", str(out))
    assert isinstance(message, str) and "the folder is not empty" in message
    message = home.call("export", "--out", str(home.folder / "other"))
    assert isinstance(message, str) and "name either a strategy" in message


def test_an_exported_pipeline_shows_its_card_and_is_audited_to_its_checkpoint(home: Home) -> None:
    profile = load_profile(str(home.profile), home.folder)
    checkpoint = write_checkpoint(home.outputs, Strategy.UNIFORM, home.llm, home.autoencoder)
    node = GRAPH["pipeline_export"]
    config = profile.resolved(node.configure(profile, "uniform"))
    output = node.stage.run(config, {"checkpoint": [checkpoint]}, home.outputs, "uniform")
    shown = describe(Task(node=node, partition="uniform", config=config, inputs=None, output=output), reused=False)
    card = shown["preview"].value
    assert str(output.folder) in card and "# Text to image, strategy `uniform`" in card and "library_name" not in card
    audit = Auditor(home.outputs).audit([output.ref])
    assert audit.passed
    assert [node.stage for node in audit.nodes.values()] == ["pipeline_export", "checkpoint"]
    weights = output.files(".safetensors")[0]
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert not Auditor(home.outputs).audit([output.ref]).passed
