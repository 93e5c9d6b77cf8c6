"""Ray, started on this machine or joined elsewhere: the one place that says how, for data stages and engines alike."""

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
"""For the process that starts or joins Ray: no usage report; GPUs stay visible to actors that reserve none; a worker
may take its time to come up on a busy machine (Ray's own 60 s were too short beside a few other jobs)."""
_START_ATTEMPTS = 3
_SOURCE_ROOT = Path(__file__).resolve().parents[2]


def join_ray(address: str, packages: Sequence[str], *, num_cpus: int, object_store_memory_bytes: int) -> bool:
    """Start Ray on this machine (`LOCAL_RAY`) or join a cluster; return False where this process already had.

    `packages` are those of this project that workers import: a cluster is sent this process's own. Cores and memory are
    for a Ray that is started here. Raises ThroughlineError where Ray is not installed, does not start or answers not.
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
        except Exception as error:  # Ray raises the bare type where its processes are not up within 30 s
            ray.shutdown()
            if attempt == _START_ATTEMPTS:
                raise ThroughlineError(
                    f"Ray did not start on this machine in {_START_ATTEMPTS} tries ({first_line(error)}); see that it "
                    "has a core and 2 GiB of memory to spare, then run again: finished shards are kept"
                ) from error
            logging.getLogger(__name__).warning("Ray did not start (%s); it is tried again", first_line(error))
        else:
            return


def worker_environment(address: str) -> dict[str, str]:
    """Return the variables by which a worker finds this project's packages."""
    if address != LOCAL_RAY:
        return {}  # they were sent to the cluster
    # A worker starts outside the working folder; an editable install or a bare checkout must be found all the same.
    paths = [str(_SOURCE_ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
