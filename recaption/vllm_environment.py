"""The environment variables that vLLM and Ray read, named in one place; they must be set before either is imported."""

from collections.abc import Mapping

from recaption.config import VllmEngineConfig

RAY_ENVIRONMENT: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_register_timeout_seconds": "300",
}
"""For the process that starts or joins Ray: no usage report; GPUs stay visible to actors that reserve none; a worker
may take its time to come up on a busy machine (Ray's own 60 s were too short beside a few other jobs)."""


def vllm_environment(config: VllmEngineConfig) -> dict[str, str]:
    """Return the variables of the process that holds a vLLM engine."""
    variables = {
        # The scheduler runs in the engine's own process: it sees a whole list of requests at once, so that batches do
        # not depend on when a request arrived. On a CPU it also starts in 9 s instead of 34 s.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.omp_num_threads is not None:
        variables["OMP_NUM_THREADS"] = str(config.omp_num_threads)
        # Bound threads of several engines, or of an engine and a training run, would all sit on the first cores.
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if config.offline:
        variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return variables
