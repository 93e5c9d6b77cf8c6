"""The stage `pipeline_export`: its folder loads, is reproducible, is reused, resumes."""

from pathlib import Path

import pytest

from pipelines.core.config import ModelRef
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import damaged_files
from pipelines.runner.outputs import StageOutput
from pipelines.runner.units import Unit
from tests.tiny_models import write_autoencoder
from tests.training.checkpoints import write_checkpoint
from tests.training.fresh_process import printed_by
from training.config import PipelineExportConfig, SamplerConfig, Strategy
from training.export.pipeline_export import STAGE


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return write_autoencoder(tmp_path_factory.mktemp("vae"))


def _config(llm: ModelRef, autoencoder: ModelRef, *, whole: bool) -> PipelineExportConfig:
    sampler = SamplerConfig(num_steps=2, guidance_scale=2.5)
    return PipelineExportConfig(text_encoder=llm, autoencoder=autoencoder, sampler=sampler, save_text_encoder=whole)


def _run(root: Path, llm: ModelRef, autoencoder: ModelRef, *, whole: bool = False) -> StageOutput:
    checkpoint = write_checkpoint(root, Strategy.JOINT, llm, autoencoder)
    return STAGE.run(_config(llm, autoencoder, whole=whole), {"checkpoint": [checkpoint]}, root, "joint")


@pytest.mark.parametrize("whole", [False, True])
def test_equal_checkpoints_give_equal_bytes_and_a_second_run_reuses_them(
    whole: bool, tmp_path: Path, llm: ModelRef, autoencoder: ModelRef
) -> None:
    here = _run(tmp_path / "here", llm, autoencoder, whole=whole)
    again = _run(tmp_path / "here", llm, autoencoder, whole=whole)
    assert again.manifest.environment == here.manifest.environment
    there = _run(tmp_path / "there", llm, autoencoder, whole=whole)
    assert there.manifest.environment != here.manifest.environment
    assert there.data_version == here.data_version
    names = {entry.path for entry in here.manifest.files}
    assert {"README.md", "model_index.json", "pipeline.py", "vae/config.json"} <= names
    assert any(name.startswith("text_encoder/") for name in names) == whole
    assert names == {path.relative_to(here.folder).as_posix() for path in here.folder.rglob("*") if path.is_file()} - {
        "manifest.json"
    }


def test_the_manifest_describes_the_export(tmp_path: Path, llm: ModelRef, autoencoder: ModelRef) -> None:
    output = _run(tmp_path, llm, autoencoder)
    (checkpoint,) = output.manifest.inputs["checkpoint"]
    summary = output.manifest.summary
    assert (summary["strategy"], summary["checkpoint"]) == ("joint", checkpoint.data_version)
    assert summary["text_encoder"] == {"id": llm.id, "revision": llm.revision, "saved_in": False}
    assert {model.role for model in output.manifest.models} == {"text_encoder", "autoencoder"}
    assert damaged_files(output.folder, output.manifest, read_bytes=True) == []


def test_a_run_killed_between_two_files_is_resumed(
    tmp_path: Path, llm: ModelRef, autoencoder: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = _run(tmp_path / "undisturbed", llm, autoencoder)
    original, moved = Unit.adopt, []

    def killed(unit: Unit, source: Path, path: str) -> None:
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(path)
        original(unit, source, path)

    monkeypatch.setattr(Unit, "adopt", killed)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "killed", llm, autoencoder)
    monkeypatch.undo()
    assert _run(tmp_path / "killed", llm, autoencoder).data_version == undisturbed.data_version


def test_the_checkpoint_of_another_strategy_is_refused(tmp_path: Path, llm: ModelRef, autoencoder: ModelRef) -> None:
    checkpoint = write_checkpoint(tmp_path, Strategy.STATIC, llm, autoencoder)
    with pytest.raises(ThroughlineError, match="pipeline_export joint: got the checkpoint of static"):
        STAGE.run(_config(llm, autoencoder, whole=False), {"checkpoint": [checkpoint]}, tmp_path, "joint")


@pytest.mark.slow
def test_a_fresh_process_samples_from_the_outputs_folder(tmp_path: Path, llm: ModelRef, autoencoder: ModelRef) -> None:
    output = _run(tmp_path / "outputs", llm, autoencoder, whole=True)
    code = (
        "import sys, torch\nfrom diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(pipe('a dog', generator=torch.Generator().manual_seed(1), output_type='np').images.shape)\n"
    )
    lines = printed_by(code, tmp_path, str(output.folder))
    assert lines[-1] == "(1, 32, 32, 3)"
