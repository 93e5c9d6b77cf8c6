"""The environment variables that vLLM reads, named in one place; they must be set before it is imported."""

from recaption.config import VllmEngineConfig


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
