"""A real judge: a tiny random Qwen3-VL in vLLM on Ray scores samples, one request after another."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from evaluation.config import ScoresConfig
from evaluation.judging.scores import STAGE
from pipelines.runner.outputs import StageOutput
from pipelines.runner.request import StageRequest, write_request
from recaption.config import PoolConfig, VllmEngineConfig
from tests.evaluation.worlds import write_samples
from tests.tiny_models import write_qwen3_vl

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ScoresConfig:
    judge = VllmEngineConfig(
        model=write_qwen3_vl(tmp_path_factory.mktemp("judge")),
        dtype="float32",
        max_model_len=768,
        max_num_seqs=16,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        omp_num_threads=1,
        offline=True,
    )
    return ScoresConfig(
        judge=judge,
        pool=PoolConfig(object_store_memory_bytes=80 << 20),
        images_per_unit=4,
        max_rating_tokens=16,
        max_unscored_share=1.0,
    )


def test_one_process_judges_several_requests(config: ScoresConfig, prompts: StageOutput, tmp_path: Path) -> None:
    requests = []
    for benchmark in ("genai_bench", "drawbench", "geneval"):
        samples = write_samples(tmp_path, "static", benchmark, prompts)
        request = StageRequest(
            stage="scores",
            partition=f"static|{benchmark}",
            config=config.model_dump(mode="json"),
            inputs={"samples": [str(samples.manifest_path)], "prompt_sets": [str(prompts.manifest_path)]},
            output_root=str(tmp_path),
        )
        path = tmp_path / f"{benchmark}.json"
        write_request(path, request)
        requests += ["--config", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.runner", "scores", *requests],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    genai, drawbench, geneval = (StageOutput.load(Path(line)) for line in done.stdout.split())
    values = pq.read_table(genai.path("scores.parquet"))["value"].to_pylist()
    assert len(values) == 7 and all(0 < value < 1 for value in values)
    answers = pq.read_table(genai.path("answers.parquet")).to_pylist()
    assert all(math.isfinite(row["logprob_yes"]) and math.isfinite(row["logprob_no"]) for row in answers)
    assert {row["value"] for row in pq.read_table(geneval.path("scores.parquet")).to_pylist()} <= {0.0, 1.0}
    # A random model gives no valid rating: every axis of every image is dropped with a reason.
    table = drawbench.manifest.conservation
    assert table is not None and (table.rows_in, table.rows_out) == (9, 0)
    assert set(table.dropped) <= {"missing", "cut", "not_a_number"}
    assert json.loads(json.dumps(genai.manifest.summary))["judge"]["id"] == config.judge.model.id
    again = STAGE.find_finished(
        config,
        {"samples": [StageOutput.load(Path(p)) for p in _inputs(genai, tmp_path)], "prompt_sets": [prompts]},
        tmp_path,
        "static|genai_bench",
    )
    assert again is not None and again.data_version == genai.data_version


def _inputs(scores: StageOutput, root: Path) -> list[Path]:
    return [root / ref.stage / ref.data_version / "manifest.json" for ref in scores.manifest.inputs["samples"]]
