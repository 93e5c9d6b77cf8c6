"""The profiles: demo (a laptop), single_gpu, paper (the published scale on a cluster)."""

from collections.abc import Callable, Mapping
from pathlib import Path

from evaluation.benchmarks.prompt_files import scan_prompt_file
from evaluation.config import (
    JudgeCalibrationConfig,
    PromptFile,
    PromptSetsConfig,
    ReportConfig,
    SamplesConfig,
    ScoresConfig,
)
from features.config import LatentsConfig, TextFeaturesConfig
from orchestration.launch.launcher import PROJECT_ROOT, AccelerateLaunch, LocalLaunch
from orchestration.profiles.model_pins import LOCAL, UNPINNED
from orchestration.profiles.profile import DemoWorld, MachineRequirements, Profile
from pipelines.cluster.config import WorkersConfig
from pipelines.core.config import ModelRef
from pipelines.dataset.config import DatasetConfig
from pipelines.download.config import FetchConfig, ImagesConfig, ImageTransform
from pipelines.laion.config import LaionSelectionConfig, LaionSubsetConfig
from pipelines.shards.config import ShardsConfig
from recaption.config import CaptionsConfig, PoolConfig, VllmEngineConfig
from training.config import (
    PAPER_ARMS,
    ModelConfig,
    SamplerConfig,
    TrainingConfig,
    demo_model,
    demo_sampler,
    demo_training,
)

_ARMS = tuple(arm.name for arm in PAPER_ARMS)
_DEMO = PROJECT_ROOT / "demo"
_TEMPLATE = "released-1"

QWEN3_VL_32B = ModelRef(id="Qwen/Qwen3-VL-32B-Instruct", revision="0cfaf48183f594c314753d30a4c4974bc75f3ccb")
QWEN3_VL_8B = ModelRef(id="Qwen/Qwen3-VL-8B-Instruct", revision="0c351dd01ed87e9c1b53cbc748cba10e6187ff3b")
QWEN3_VL_4B = ModelRef(id="Qwen/Qwen3-VL-4B-Instruct", revision="ebb281ec70b05090aa6165b016eac8ec08e71b17")
QWEN3_VL_235B = ModelRef(id="Qwen/Qwen3-VL-235B-A22B-Instruct", revision=UNPINNED)
UNIFIED_REWARD_2 = ModelRef(id="CodeGoat24/UnifiedReward-2.0-qwen3vl-8b", revision=UNPINNED)
"""The paper says UnifiedReward-2.0 but not which size."""
SD3 = ModelRef(
    id="stabilityai/stable-diffusion-3-medium-diffusers", revision="ea42f8cef0f178587cf766dc8129abd379c90671"
)


def _benchmark_files(folder: Path) -> PromptSetsConfig:
    """Return the published prompt files, pinned by digest; the user places them in `folder`."""
    return PromptSetsConfig(
        geneval=PromptFile(
            path=str(folder / "geneval" / "evaluation_metadata.jsonl"),
            sha256="5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
            num_prompts=553,
        ),
        genai_image=PromptFile(
            path=str(folder / "genai_bench" / "genai_image.json"),
            sha256="a7e15e46786b64f5d3518d3450b2b5a86438f2b946e8d093dcaf0d5c5c094b1e",
            num_prompts=1600,
        ),
        genai_skills=PromptFile(
            path=str(folder / "genai_bench" / "genai_skills.json"),
            sha256="8df390cb89d0584389747c69acecd03615ffc229c1db71a90e4abd3d12d9a3d2",
        ),
        drawbench=PromptFile(
            path=str(folder / "drawbench" / "DrawBench.csv"),
            sha256="b6d99b3151798b34f2ac3604d3701f66d66927b9e0f55785f3e1d7fdbc1f5fea",
            num_prompts=200,
        ),
    )


def demo(home: Path) -> Profile:
    """The whole pipeline on two CPU cores in minutes: a rendered world, tiny trained models, every real engine."""
    world = DemoWorld(folder=str(home / "demo-world"))
    vision_language = ModelRef(id="throughline/demo-vlm", revision=LOCAL, path=str(_DEMO / "models" / "vlm"))
    autoencoder = ModelRef(id="throughline/demo-vae", revision=LOCAL, path=str(_DEMO / "models" / "vae"))
    text_encoder = ModelRef(
        id="HuggingFaceTB/SmolLM2-135M-Instruct", revision=LOCAL, path=str(home / "models" / "smollm2-135m-instruct")
    )
    engine = VllmEngineConfig(
        model=vision_language,
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
        kv_cache_memory_bytes=256 << 20,
        omp_num_threads=1,
        offline=True,
    )
    pool = PoolConfig(max_actors=1, num_cpus_per_actor=1)
    return Profile(
        name="demo",
        home=str(home),
        source=(str(home / "demo-world" / "laion"),),
        world=world,
        laion_subset=LaionSubsetConfig(
            min_similarity=0.28,
            nsfw_allowed=("UNLIKELY",),
            min_side_px=64,
            max_aspect=3.0,
            min_text_chars=3,
            max_text_chars=1000,
        ),
        images=ImagesConfig(
            fetch=FetchConfig(
                allowed_private_hosts=(f"127.0.0.1:{world.port}",),
                connect_seconds=2.0,
                read_seconds=1.5,
                total_seconds=3.0,
                retry_timeouts=False,
                retries=2,
                max_body_bytes=4 << 20,
                backoff_seconds=0.1,
                total_connections=32,
            ),
            transform=ImageTransform(min_source_side_px=64, max_source_aspect=3.0),
            rows_per_shard=100,
        ),
        captions=CaptionsConfig(
            captioner=engine, prompt_version="brief-1", max_caption_tokens=96, rows_per_batch=100, pool=pool
        ),
        latents=LatentsConfig(autoencoder=autoencoder, num_threads=2),
        text_features=TextFeaturesConfig(text_encoder=text_encoder, template_version="plain-1", num_threads=2),
        dataset=DatasetConfig(validation_share=0.05),
        text_encoder=text_encoder,
        autoencoder=autoencoder,
        template_version="plain-1",
        model=demo_model(),
        # 350 steps instead of 450: on two quiet cores an arm takes 50 s and the whole demo under 15 minutes.
        training=demo_training(steps=350, validate_every=175, checkpoint_every=70),
        arms=_ARMS,
        prompt_sets=PromptSetsConfig(
            geneval=scan_prompt_file(_DEMO / "prompt_files" / "geneval" / "evaluation_metadata.jsonl"),
            genai_image=scan_prompt_file(_DEMO / "prompt_files" / "genai_bench" / "genai_image.json"),
            genai_skills=scan_prompt_file(_DEMO / "prompt_files" / "genai_bench" / "genai_skills.json"),
            drawbench=scan_prompt_file(_DEMO / "prompt_files" / "drawbench" / "DrawBench.csv"),
        ),
        samples=SamplesConfig(
            text_encoder=text_encoder,
            autoencoder=autoencoder,
            sampler=demo_sampler(),
            images_per_prompt={"geneval": 2, "genai_bench": 1, "drawbench": 1},
        ),
        scores=ScoresConfig(judge=engine, pool=pool),
        judge_calibration=JudgeCalibrationConfig(judge=engine, pool=pool),
        report=ReportConfig(
            profile="demo",
            note=(
                "Everything here ran on a CPU in minutes: a drawn world of a few hundred pictures, a backbone of a few "
                "million parameters, and about a minute of training an arm. Scene and colour can show; counting and "
                "relations can not, and differences between arms are mostly noise. It proves the chain, not the paper."
            ),
        ),
        launches={"checkpoint": AccelerateLaunch(cpu=True, threads_per_process=2)},
        batches={
            "laion_subset": 100,
            "images": 100,
            "captions": 100,
            "shards": 100,
            "latents": 100,
            "text_features": 100,
            "checkpoint": 7,
            "pipeline_export": 7,
            "samples": 24,
            "scores": 24,
            "fusion_analysis": 7,
            "trajectory_analysis": 7,
        },
        needs=MachineRequirements(memory_gib=6, disk_gib=6),
    )


def single_gpu(home: Path) -> Profile:
    """One GPU of 80 GiB: published models of a few billion parameters, a backbone of a few hundred million."""
    engine = VllmEngineConfig(model=QWEN3_VL_8B, dtype="bfloat16", max_model_len=4096, max_num_seqs=256)
    pool = PoolConfig(num_cpus_per_actor=2, num_gpus_per_actor=1, object_store_memory_bytes=4 << 30)
    return Profile(
        name="single_gpu",
        home=str(home),
        source=(str(Path("laion").absolute()),),
        laion_subset=_laion_filters(),
        images=_published_images(connections=256),
        captions=CaptionsConfig(captioner=engine, pool=pool),
        latents=LatentsConfig(
            autoencoder=SD3, subfolder="vae", dtype="bfloat16", batch_size=64, device="cuda", storage_dtype="float16"
        ),
        text_features=None,
        dataset=DatasetConfig(validation_share=0.01),
        text_encoder=QWEN3_VL_4B,
        autoencoder=SD3,
        template_version=_TEMPLATE,
        model=ModelConfig(hidden_size=1024, num_blocks=12, num_heads=16, mlp_width=4096, fuse_layer_stride=2),
        training=TrainingConfig(
            steps=50_000,
            batch_size=256,
            accumulation_steps=4,
            precision="bfloat16",
            text_dtype="bfloat16",
            warmup_steps=1000,
            device="cuda",
            text_memory_bytes=32 << 30,
        ),
        arms=_ARMS,
        prompt_sets=_benchmark_files(Path("benchmarks").absolute()),
        samples=SamplesConfig(
            text_encoder=QWEN3_VL_4B,
            autoencoder=SD3,
            sampler=SamplerConfig(batch_size=32),
            prompts_per_unit=32,
            device="cuda",
        ),
        scores=ScoresConfig(judge=engine, pool=pool),
        drawbench_scores=ScoresConfig(judge=engine.model_copy(update={"model": UNIFIED_REWARD_2}), pool=pool),
        judge_calibration=JudgeCalibrationConfig(judge=engine, pool=pool, num_images=1000),
        report=ReportConfig(profile="single_gpu"),
        launches={"checkpoint": AccelerateLaunch(mixed_precision="bf16", threads_per_process=8)},
        batches={
            "captions": 8,
            "latents": 32,
            "pipeline_export": 7,
            "samples": 24,
            "scores": 24,
            "fusion_analysis": 7,
            "trajectory_analysis": 7,
        },
        check_bytes=False,
        needs=MachineRequirements(num_gpus=1, gpu_memory_gib=79, memory_gib=64, disk_gib=1000),
    )


def paper(home: Path) -> Profile:
    """The published scale: eight nodes of eight GPUs, 500,000 steps of batch 512, a 2.2 B backbone per strategy."""
    captioner = VllmEngineConfig(
        model=QWEN3_VL_32B, dtype="bfloat16", tensor_parallel_size=2, max_model_len=4096, max_num_seqs=256
    )
    judge = VllmEngineConfig(
        model=QWEN3_VL_235B, dtype="bfloat16", tensor_parallel_size=8, max_model_len=4096, max_num_seqs=128
    )
    workers = WorkersConfig(ray_address="auto")
    judges = PoolConfig(ray_address="auto", max_actors=8, num_cpus_per_actor=8, num_gpus_per_actor=8)
    return Profile(
        name="paper",
        home=str(home),
        source=(str(Path("laion").absolute()),),
        # URLs are deduplicated over all parts, so that the kept row does not depend on the order of files.
        laion_subset=_laion_filters().model_copy(update={"drop_duplicate_urls": False, "workers": workers}),
        laion_selection=LaionSelectionConfig(workers=workers),
        # Each shard is downloaded by its own process; a node of 64 cores runs 16 of them.
        images=_published_images(connections=128).model_copy(
            update={"workers": workers.model_copy(update={"cpus_per_unit": 4})}
        ),
        captions=CaptionsConfig(
            captioner=captioner,
            pool=PoolConfig(
                ray_address="auto",
                max_actors=32,
                num_cpus_per_actor=4,
                num_gpus_per_actor=2,
                object_store_memory_bytes=16 << 30,
            ),
        ),
        shards=ShardsConfig(workers=workers),
        latents=LatentsConfig(autoencoder=SD3, subfolder="vae", dtype="bfloat16", batch_size=128, device="cuda"),
        text_features=None,
        dataset=DatasetConfig(validation_share=0.001, workers=workers),
        text_encoder=QWEN3_VL_4B,
        autoencoder=SD3,
        template_version=_TEMPLATE,
        model=ModelConfig(),
        training=TrainingConfig(
            precision="bfloat16",
            text_dtype="bfloat16",
            num_processes=64,
            device="cuda",
            text_memory_bytes=128 << 30,
        ),
        arms=_ARMS,
        prompt_sets=_benchmark_files(Path("benchmarks").absolute()),
        samples=SamplesConfig(
            text_encoder=QWEN3_VL_4B,
            autoencoder=SD3,
            sampler=SamplerConfig(batch_size=64),
            prompts_per_unit=64,
            device="cuda",
        ),
        scores=ScoresConfig(judge=judge, pool=judges),
        drawbench_scores=ScoresConfig(
            judge=VllmEngineConfig(model=UNIFIED_REWARD_2, dtype="bfloat16", max_model_len=4096, max_num_seqs=256),
            pool=PoolConfig(ray_address="auto", max_actors=8, num_cpus_per_actor=4, num_gpus_per_actor=1),
        ),
        judge_calibration=JudgeCalibrationConfig(judge=judge, pool=judges, num_images=1000),
        report=ReportConfig(profile="paper"),
        launches={
            "captions": LocalLaunch(),
            "checkpoint": AccelerateLaunch(
                num_processes=64,
                num_machines=8,
                mixed_precision="bf16",
                threads_per_process=8,
                main_process_ip="127.0.0.1",
                main_process_port=29500,
            ),
        },
        batches={
            "captions": 8,
            "latents": 64,
            "pipeline_export": 7,
            "samples": 24,
            "scores": 24,
            "fusion_analysis": 7,
            "trajectory_analysis": 7,
        },
        check_bytes=False,
        needs=MachineRequirements(num_gpus=8, gpu_memory_gib=79, memory_gib=512, disk_gib=50_000),
    )


def _laion_filters() -> LaionSubsetConfig:
    return LaionSubsetConfig(
        min_similarity=0.3,
        nsfw_allowed=("UNLIKELY",),
        min_side_px=256,
        max_aspect=3.0,
        min_text_chars=3,
        max_text_chars=2000,
    )


def _published_images(*, connections: int) -> ImagesConfig:
    return ImagesConfig(
        fetch=FetchConfig(total_connections=connections),
        # Cheaper than full decoding, and differs from it no more than another filter: `tests.benchmarks.download`.
        transform=ImageTransform(min_source_side_px=256, max_source_aspect=3.0, jpeg_decoding="scaled"),
        rows_per_shard=10_000,
        decode_workers=16,
    )


PROFILES: Mapping[str, Callable[[Path], Profile]] = {"demo": demo, "single_gpu": single_gpu, "paper": paper}
