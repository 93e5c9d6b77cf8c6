"""Environment variables for vLLM; they must be set before it is imported."""

from recaption.config import VllmEngineConfig


def vllm_environment(config: VllmEngineConfig) -> dict[str, str]:
    """Return the environment variables of a process that runs a vLLM engine."""
    variables = {
        # With the scheduler in the calling process it sees all requests at once, so batches do not depend on arrival
        # times. On a CPU it also starts in 9 s instead of 34 s.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.omp_num_threads is not None:
        variables["OMP_NUM_THREADS"] = str(config.omp_num_threads)
        # Otherwise several engines, or an engine and a training run, would pin their threads to the same first cores.
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if config.offline:
        variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return variables
