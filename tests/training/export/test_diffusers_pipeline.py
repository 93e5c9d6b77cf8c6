"""The exported pipeline loads like any diffusers pipeline and gives the sampler's images."""

import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from pipelines.core.config import ModelRef
from pipelines.core.digest import local_revision
from pipelines.core.errors import ThroughlineError
from tests.tiny_models import write_autoencoder, write_causal_lm, write_qwen3_vl
from tests.training.checkpoints import write_checkpoint
from tests.training.conftest import NUM_LAYERS, TINY_MODEL
from tests.training.fresh_process import printed_by
from training.config import SamplerConfig, Strategy
from training.diffusers_pipeline import ThroughlinePipeline
from training.export.export import build_pipeline, export_pipeline
from training.models.flow import sampling_noise
from training.sampling.sampler import load_sampler

pytestmark = pytest.mark.slow

SETTINGS = SamplerConfig(num_steps=3, guidance_scale=2.5, time_shift=3.0)
SHAPE = (TINY_MODEL.latent_channels, TINY_MODEL.latent_size, TINY_MODEL.latent_size)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return write_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, llm: ModelRef, autoencoder: ModelRef) -> Path:
    folder = tmp_path_factory.mktemp("export")
    checkpoint = write_checkpoint(folder / "outputs", Strategy.JOINT, llm, autoencoder)
    return export_pipeline(checkpoint, llm, autoencoder, SETTINGS, folder / "joint")


@pytest.fixture
def pipe(exported: Path) -> Any:
    loaded = ThroughlinePipeline.from_pretrained(exported)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def _noise(prompt: str, index: int, seed: int = 7) -> Tensor:
    return sampling_noise(seed, prompt, index, SHAPE)


PROMPTS, INDICES = ["a red dog", "two blue houses left of a star", "a red dog"], [0, 0, 1]


def _drawn(pipe: Any, gate_shift: bool) -> Tensor:
    noise = torch.stack([_noise(prompt, index) for prompt, index in zip(PROMPTS, INDICES, strict=True)])
    return pipe(PROMPTS, latents=noise, output_type="latent", gate_shift=gate_shift).images


@pytest.mark.parametrize("strategy", Strategy)
def test_latents_are_those_of_the_sampler(
    strategy: Strategy, tmp_path: Path, llm: ModelRef, autoencoder: ModelRef
) -> None:
    checkpoint = write_checkpoint(tmp_path, strategy, llm, autoencoder)
    settings = SETTINGS.model_copy(update={"gate_shift": strategy.has_time_gate})
    drawn = _drawn(build_pipeline(checkpoint, llm, autoencoder, SETTINGS), settings.gate_shift)
    expected = load_sampler(checkpoint, llm, autoencoder).latents(PROMPTS, INDICES, 7, settings)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strategy", [Strategy.JOINT, Strategy.FUSE_DIT])
def test_latents_of_the_exported_folder_are_those_of_the_sampler(
    strategy: Strategy, tmp_path: Path, llm: ModelRef, autoencoder: ModelRef
) -> None:
    checkpoint = write_checkpoint(tmp_path, strategy, llm, autoencoder)
    folder = export_pipeline(checkpoint, llm, autoencoder, SETTINGS, tmp_path / "export")
    pipe: Any = ThroughlinePipeline.from_pretrained(folder)
    drawn = _drawn(pipe, gate_shift=False)
    sampler = load_sampler(checkpoint, llm, autoencoder, encoder=pipe.prompt_encoder())
    torch.testing.assert_close(drawn, sampler.latents(PROMPTS, INDICES, 7, SETTINGS), atol=1e-5, rtol=1e-5)
    # The encoder's weights are at other addresses, so sums may round differently before hidden states become bfloat16.
    expected = load_sampler(checkpoint, llm, autoencoder).latents(PROMPTS, INDICES, 7, SETTINGS)
    torch.testing.assert_close(drawn, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("strategy", [Strategy.DEPTH_WISE, Strategy.FUSE_DIT])
def test_only_the_language_model_of_a_vision_language_model_is_exported(
    strategy: Strategy, tmp_path: Path, autoencoder: ModelRef
) -> None:
    encoder = write_qwen3_vl(tmp_path / "vlm")
    text = AutoConfig.from_pretrained(encoder.source).get_text_config(decoder=True)
    model = TINY_MODEL.model_copy(
        update={
            "text_width": text.hidden_size,
            "num_text_layers": text.num_hidden_layers,
            "num_heads": text.num_attention_heads,
            "num_kv_heads": text.num_key_value_heads,
            "head_dim": text.head_dim,
            "num_blocks": text.num_hidden_layers - 1,
        }
    )
    checkpoint = write_checkpoint(tmp_path, strategy, encoder, autoencoder, model)
    folder = export_pipeline(checkpoint, encoder, autoencoder, SETTINGS, tmp_path / "export")
    with safe_open(folder / "text_encoder" / "model.safetensors", framework="pt") as tensors:
        assert not [name for name in tensors.keys() if "visual" in name]  # noqa: SIM118 - not a mapping
    pipe: Any = ThroughlinePipeline.from_pretrained(folder)
    drawn = _drawn(pipe, gate_shift=False)
    sampler = load_sampler(checkpoint, encoder, autoencoder, encoder=pipe.prompt_encoder())
    torch.testing.assert_close(drawn, sampler.latents(PROMPTS, INDICES, 7, SETTINGS), atol=1e-5, rtol=1e-5)
    expected = load_sampler(checkpoint, encoder, autoencoder).latents(PROMPTS, INDICES, 7, SETTINGS)
    torch.testing.assert_close(drawn, expected, atol=1e-3, rtol=1e-3)


def test_an_encoder_that_is_only_named_is_loaded_at_the_first_call(
    tmp_path: Path, llm: ModelRef, autoencoder: ModelRef
) -> None:
    assert llm.path is not None
    named = ModelRef(id=llm.path, revision="0" * 40)
    checkpoint = write_checkpoint(tmp_path, Strategy.STATIC, named, autoencoder)
    folder = export_pipeline(checkpoint, named, autoencoder, SETTINGS, tmp_path / "export", save_text_encoder=False)
    assert not (folder / "text_encoder").exists() and not (folder / "tokenizer").exists()
    pipe = ThroughlinePipeline.from_pretrained(folder)
    expected = load_sampler(checkpoint, named, autoencoder).latents(PROMPTS, INDICES, 7, SETTINGS)
    torch.testing.assert_close(_drawn(pipe, gate_shift=False), expected, atol=1e-5, rtol=1e-5)


def test_a_local_encoder_is_loaded_from_its_folder_and_checked(
    tmp_path: Path, llm: ModelRef, autoencoder: ModelRef
) -> None:
    assert llm.path is not None
    local = llm.model_copy(update={"revision": local_revision(Path(llm.path))})
    checkpoint = write_checkpoint(tmp_path, Strategy.FUSE_DIT, local, autoencoder)
    folder = export_pipeline(checkpoint, local, autoencoder, SETTINGS, tmp_path / "export", save_text_encoder=False)
    assert "pipe.load_text_encoder(folder)" in (folder / "README.md").read_text()
    pipe = ThroughlinePipeline.from_pretrained(folder)
    with pytest.raises(ThroughlineError, match=rf"{llm.id} \({local.revision}\) is neither in .* nor on a hub"):
        _drawn(pipe, gate_shift=False)
    other = write_causal_lm(tmp_path / "other", num_layers=NUM_LAYERS, seed=1)
    with pytest.raises(ThroughlineError, match=f"trained with {llm.id} at {local.revision}; pass the folder"):
        pipe.load_text_encoder(other.path)
    pipe.load_text_encoder(llm.path)
    expected = load_sampler(checkpoint, local, autoencoder).latents(PROMPTS, INDICES, 7, SETTINGS)
    torch.testing.assert_close(_drawn(pipe, gate_shift=False), expected, atol=1e-5, rtol=1e-5)


def test_a_fresh_process_loads_the_folder_both_ways(exported: Path, tmp_path: Path) -> None:
    """By either class, after the folder was moved away from its sources."""
    code = (
        "import sys, torch\nfrom diffusers import DiffusionPipeline\n"
        "loaded = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "from training.diffusers_pipeline import ThroughlinePipeline\n"
        "assert isinstance(loaded, ThroughlinePipeline)\n"
        "own = ThroughlinePipeline.from_pretrained(sys.argv[1])\n"
        "for pipe in (loaded, own):\n"
        "    images = pipe('a dog', generator=torch.Generator().manual_seed(1), output_type='np').images\n"
        "    print(images.shape, round(float(images.sum()), 3))\n"
    )
    lines = printed_by(code, tmp_path, str(exported))
    first, second = lines[-2:]
    assert first == second and first.startswith("(1, 32, 32, 3)")


def test_a_fresh_process_loads_it_by_its_hub_id(exported: Path, tmp_path: Path) -> None:
    """From the hub's cache, with the layout of a download."""
    commit, repository = "c0ffee" * 6 + "beef", tmp_path / "hub" / "models--user--repo"
    shutil.copytree(exported, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "import torch\nfrom diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained('user/repo', trust_remote_code=True)\n"
        "print(pipe('a dog', generator=torch.Generator().manual_seed(1), output_type='np').images.shape)\n"
    )
    lines = printed_by(code, tmp_path)
    assert lines[-1] == "(1, 32, 32, 3)"


def test_without_trust_remote_code_the_general_class_refuses_the_folder(exported: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(exported)


def test_saving_again_gives_the_same_pipeline(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "again")
    again = ThroughlinePipeline.from_pretrained(tmp_path / "again")
    noise = _noise("a dog", 0)[None]
    drawn = [each("a dog", latents=noise, output_type="latent").images for each in (pipe, again)]
    assert torch.equal(*drawn)
    assert again.config.lineage == pipe.config.lineage
    assert (tmp_path / "again" / "README.md").read_text().startswith("---\nlibrary_name: diffusers")


def test_a_call_samples_several_images_of_several_prompts(pipe: Any) -> None:
    prompts = ["a dog", "a blue star"]
    noise = torch.stack([_noise(prompt, index) for prompt in prompts for index in range(2)])
    together = pipe(prompts, num_images_per_prompt=2, latents=noise, output_type="latent").images
    for row in range(4):
        alone = pipe(prompts[row // 2], latents=noise[row : row + 1], output_type="latent").images
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    assert [image.size for image in pipe(prompts, generator=generators).images] == [(32, 32)] * 2
    (tensor,) = pipe("a dog", height=48, width=16, output_type="pt", return_dict=False)
    assert tensor.shape == (1, 3, 48, 16) and tensor.min() >= 0 and tensor.max() <= 1


def test_each_prompt_has_its_own_negative_prompt(pipe: Any) -> None:
    prompts, negatives = ["a dog", "a dog"], ["a red house", "two"]
    noise = _noise("a dog", 0).expand(2, *SHAPE)
    together = pipe(prompts, negatives, latents=noise, output_type="latent").images
    for row, negative in enumerate(negatives):
        alone = pipe("a dog", negative, latents=noise[:1], output_type="latent").images
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(*together, atol=1e-3)
    unguided = [pipe("a dog", n, latents=noise[:1], guidance_scale=1.0, output_type="latent").images for n in negatives]
    assert torch.equal(*unguided)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize(
    ("scheduler", "settings", "num_evaluations"),
    [
        (FlowMatchHeunDiscreteScheduler, {}, 15),
        (DPMSolverMultistepScheduler, FLOW | {"flow_shift": SETTINGS.time_shift}, 8),
        (UniPCMultistepScheduler, FLOW | {"flow_shift": SETTINGS.time_shift}, 8),
    ],
)
def test_flow_matching_schedulers_can_be_swapped(
    pipe: Any, scheduler: Any, settings: dict[str, Any], num_evaluations: int
) -> None:
    noise = _noise("a dog", 0)[None]

    def drawn(num_steps: int) -> Tensor:
        return pipe("a dog", latents=noise, num_inference_steps=num_steps, output_type="latent").images

    exact = drawn(64)
    euler_error = (drawn(8) - exact).abs().mean()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)
    error = (drawn(8) - exact).abs().mean()
    assert pipe.num_timesteps == num_evaluations
    assert error < euler_error


@pytest.mark.parametrize(
    ("scheduler", "match"),
    [
        (DDIMScheduler(), "DDIMScheduler is not set to flow matching.*FlowMatch.*flow_prediction.*use_flow_sigmas"),
        (DPMSolverMultistepScheduler(), "DPMSolverMultistepScheduler is not set to flow matching"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "is not set to flow matching"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "is not set to flow matching"),
        (FlowMatchEulerDiscreteScheduler(num_train_timesteps=100), "num_train_timesteps 100; build it with 1000"),
    ],
)
def test_other_schedulers_are_refused(pipe: Any, exported: Path, scheduler: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ThroughlinePipeline.from_pretrained(exported, scheduler=scheduler)
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=match):
        pipe("a dog")


def test_moving_the_pipeline_moves_all_its_parts(pipe: Any) -> None:
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert set(parts) == {"transformer", "vae", "text_encoder"}
    pipe.to(torch.float64)
    assert {value.dtype for part in parts.values() for value in part.parameters()} == {torch.float64}
    pipe.to("meta")
    assert pipe.device.type == "meta"
    assert {value.device.type for part in parts.values() for value in part.parameters()} == {"meta"}


def test_offloading_moves_each_part_to_the_device_when_needed(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    noise, brought = _noise("a dog", 0)[None], []
    expected = pipe("a dog", latents=noise, output_type="pt").images
    original = CpuOffload.pre_forward

    def watched(hook: CpuOffload, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        brought.append(module)
        return original(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", watched)
    pipe.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(pipe("a dog", latents=noise, output_type="pt").images, expected)
    assert list(dict.fromkeys(brought)) == [pipe.text_encoder, pipe.transformer, pipe.vae]


def test_the_progress_bar_counts_evaluations(pipe: Any) -> None:
    for scheduler, total in ((FlowMatchEulerDiscreteScheduler, 3), (FlowMatchHeunDiscreteScheduler, 5)):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        shown = io.StringIO()
        pipe.set_progress_bar_config(file=shown, mininterval=0, miniters=1)
        pipe("a dog", output_type="latent")
        assert all(f" {done}/{total} " in shown.getvalue() for done in range(total + 1))
    pipe.set_progress_bar_config(file=shown, disable=True)
    before = shown.getvalue()
    pipe("a dog", output_type="latent")
    assert shown.getvalue() == before


def test_an_overlong_prompt_is_truncated_with_a_warning(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    noise, prompt = _noise("a dog", 0)[None], "dog " * 600
    with caplog.at_level(logging.WARNING):
        drawn = pipe(prompt, latents=noise, output_type="latent").images
    (message,) = [record.message for record in caplog.records if "is truncated" in record.message]
    assert "longer than the 512 tokens" in message and "shorten it: 'dog dog" in message
    assert torch.equal(pipe(prompt + "house", latents=noise, output_type="latent").images, drawn)


@pytest.mark.parametrize("form", ["instruction", "empty"])
def test_an_empty_prompt_samples_unconditionally_like_the_sampler(
    form: str, tmp_path: Path, llm: ModelRef, autoencoder: ModelRef
) -> None:
    checkpoint = write_checkpoint(
        tmp_path, Strategy.STATIC, llm, autoencoder, template_version="released-1", prompt_drop_form=form
    )
    folder = export_pipeline(checkpoint, llm, autoencoder, SETTINGS, tmp_path / "export")
    pipe: Any = ThroughlinePipeline.from_pretrained(folder)
    sampler = load_sampler(checkpoint, llm, autoencoder)
    for prompt in ("a dog", ""):
        drawn = pipe(prompt, latents=_noise(prompt, 0)[None], output_type="latent").images
        torch.testing.assert_close(drawn, sampler.latents([prompt], [0], 7, SETTINGS), atol=1e-3, rtol=1e-3)
    of_none = [
        pipe("", latents=_noise("", 0)[None], guidance_scale=guidance_scale, output_type="latent").images
        for guidance_scale in (1.0, 6.0)
    ]
    torch.testing.assert_close(*of_none, atol=1e-4, rtol=1e-4)


def test_callbacks_see_and_change_latents_and_can_stop(pipe: Any) -> None:
    noise, seen = _noise("a dog", 0)[None], []

    def watch(of: Any, index: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((index, float(timestep), given["latents"].clone()))
        return given

    plain = pipe("a dog", latents=noise, output_type="latent", callback_on_step_end=watch).images
    assert [index for index, _, _ in seen] == [0, 1, 2]
    assert [time for _, time, _ in seen] == pipe.scheduler.timesteps.tolist()
    assert torch.equal(seen[-1][2], plain)

    def change(of: Any, index: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": given["latents"] * 0} if index == 2 else {}

    changed = pipe("a dog", latents=noise, output_type="latent", callback_on_step_end=change).images
    assert not changed.any()

    def stop(of: Any, index: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        of._interrupt = index == 1
        return given

    stopped = pipe("a dog", latents=noise, output_type="latent", callback_on_step_end=stop).images
    assert torch.equal(stopped, seen[1][2])


@pytest.mark.parametrize("strategy", [Strategy.TIME_WISE, Strategy.FUSE_DIT])
@pytest.mark.parametrize("timestep_conditioning", ["none", "adaln"])
def test_lower_precision_stays_close(
    strategy: Strategy, timestep_conditioning: str, tmp_path: Path, llm: ModelRef, autoencoder: ModelRef
) -> None:
    model = TINY_MODEL.model_copy(update={"timestep_conditioning": timestep_conditioning})
    checkpoint = write_checkpoint(tmp_path, strategy, llm, autoencoder, model)
    pipe: Any = build_pipeline(checkpoint, llm, autoencoder, SETTINGS)
    noise = _noise("a dog", 0)[None]
    exact = pipe("a dog", latents=noise, output_type="latent").images
    pipe.to(torch.bfloat16)
    rough = pipe("a dog", latents=noise, output_type="latent").images
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.05 * (exact - noise).abs().mean()
    assert np.isfinite(pipe("a dog", latents=noise, output_type="np").images).all()


def test_a_call_refuses_invalid_arguments(pipe: Any) -> None:
    refusals: dict[str, dict[str, Any]] = {
        "height 30 is not a multiple of 8; use 24": {"height": 30},
        "1 prompts but 2 negative prompts": {"negative_prompt": ["a", "b"]},
        "output_type 'jpeg'": {"output_type": "jpeg"},
        r"latents are \(1, 4, 8, 8\), this call needs \(2,": {
            "latents": _noise("", 0)[None],
            "num_images_per_prompt": 2,
        },
        "callbacks get": {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
        "nothing to sample": {"num_images_per_prompt": 0},
        "num_steps": {"num_inference_steps": 0},
    }
    for match, arguments in refusals.items():
        with pytest.raises(ValueError, match=match):
            pipe("a dog", **arguments)


def test_the_card_states_lineage_without_paths(exported: Path, llm: ModelRef, autoencoder: ModelRef) -> None:
    card = (exported / "README.md").read_text()
    index = json.loads((exported / "model_index.json").read_text())
    for fact in (
        "strategy `joint`", index["lineage"]["checkpoint"], llm.revision, autoencoder.revision,
        "| text template | plain-1", '"learning_rate": 0.002', "Licence", "3 steps, guidance 2.5, 32 px",
    ):  # fmt: skip
        assert fact in card
    machine = str(exported.parent)
    for path in exported.rglob("*"):
        if path.suffix in (".json", ".md", ".py"):
            text = path.read_text()
            assert machine not in text and str(llm.path) not in text and str(autoencoder.path) not in text, path


def test_export_refuses_other_models_and_folders_with_files(
    exported: Path, tmp_path: Path, llm: ModelRef, autoencoder: ModelRef
) -> None:
    checkpoint = write_checkpoint(tmp_path, Strategy.STATIC, llm, autoencoder)
    with pytest.raises(ThroughlineError, match="the folder is not empty"):
        export_pipeline(checkpoint, llm, autoencoder, SETTINGS, exported)
    with pytest.raises(ThroughlineError, match="trained on latents of tiny-vae"):
        export_pipeline(
            checkpoint, llm, autoencoder.model_copy(update={"revision": "x"}), SETTINGS, tmp_path / "export"
        )
    assert not (tmp_path / "export").exists()
