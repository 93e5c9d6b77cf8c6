"""Configuration of how a stage's units are distributed over a Ray cluster."""

from pipelines.core.config import FrozenConfig, execution_field


class WorkersConfig(FrozenConfig):
    """Where a stage computes its units: in its own process or on a Ray cluster. Never changes the output."""

    ray_address: str | None = execution_field(None, min_length=1)
    """None: in the stage's own process. "local" starts Ray on this machine, "auto" joins the cluster this process runs
    in, ``host:port`` joins that cluster. Every node must see the output folder at the same path."""
    cpus_per_unit: float = execution_field(1.0, gt=0)
    """Cores that a unit reserves on its node; a unit of `images` runs as many decoders."""
    max_units_in_flight: int | None = execution_field(None, ge=1)
    """Units submitted to Ray at a time, each held in memory until it is done; None: twice the cluster's capacity."""
    max_deaths_per_unit: int = execution_field(4, ge=0)
    """Times a unit's worker or node may die (killed, out of memory, lost) before the stage fails."""
    room_timeout_seconds: float = execution_field(600.0, gt=0)
    """Longest wait while no node is large enough for a unit. An autoscaler needs minutes to add one."""
