"""Starts Ray on this machine or joins a cluster, for data stages and inference engines alike."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.core.errors import ThroughlineError, first_line

LOCAL_RAY = "local"
"""The address that starts Ray on this machine for the life of the process."""
RAY_ENVIRONMENT: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_register_timeout_seconds": "300",
}
"""For the process that starts or joins Ray: no usage report; GPUs stay visible to actors that reserve none; workers
get more time to start (Ray's default of 60 s was too short on a machine with a few other jobs)."""
_START_ATTEMPTS = 3
_SOURCE_ROOT = Path(__file__).resolve().parents[2]


def join_ray(address: str, packages: Sequence[str], *, num_cpus: int, object_store_memory_bytes: int) -> bool:
    """Start Ray on this machine (`LOCAL_RAY`) or join a cluster; return False if this process already did.

    `packages` are the packages of this project that workers import; a cluster receives this process's copies. Cores and
    memory apply to a local Ray. Raises ThroughlineError if Ray is not installed, does not start or does not answer.
    """
    os.environ.update(RAY_ENVIRONMENT)
    try:
        import ray
    except ImportError as error:
        raise ThroughlineError(
            f"Ray cannot be imported ({error}); install the extra 'cpu' or 'gpu' of this project"
        ) from error
    if ray.is_initialized():
        return False
    if address == LOCAL_RAY:
        _start_local(num_cpus, object_store_memory_bytes)
        return True
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"py_modules": [str(_SOURCE_ROOT / package) for package in packages]},
        )
    except ConnectionError as error:
        raise ThroughlineError(
            f"no Ray cluster answers at {address!r} ({first_line(error)}); start one with `ray start "
            "--head`, or use ray_address 'local'"
        ) from error
    except (RuntimeError, ray.exceptions.AuthenticationError) as error:  # another version of Ray or Python, no token
        raise ThroughlineError(f"the Ray cluster at {address!r} cannot be joined: {first_line(error)}") from error
    return True


def _start_local(num_cpus: int, object_store_memory_bytes: int) -> None:
    import ray

    for attempt in range(1, _START_ATTEMPTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=object_store_memory_bytes,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
        except Exception as error:  # Ray raises a bare Exception if its processes are not up within 30 s
            ray.shutdown()
            if attempt == _START_ATTEMPTS:
                raise ThroughlineError(
                    f"Ray did not start on this machine in {_START_ATTEMPTS} attempts ({first_line(error)}); make sure "
                    "that a core and 2 GiB of memory are free, then run again: finished shards are kept"
                ) from error
            logging.getLogger(__name__).warning("Ray did not start (%s); retrying", first_line(error))
        else:
            return


def worker_environment(address: str) -> dict[str, str]:
    """Return the environment variables that let a worker import this project's packages."""
    if address != LOCAL_RAY:
        return {}  # the cluster received the packages
    # A worker starts outside the working folder, but must still find an editable install or a plain checkout.
    paths = [str(_SOURCE_ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
