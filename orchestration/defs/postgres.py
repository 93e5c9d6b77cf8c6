"""Dagster storage class, named in dagster.yaml, for the PostgreSQL server that the environment names."""

from typing import Any

from dagster_postgres import DagsterPostgresStorage

from orchestration.defs.event_storage import address


class PostgresStorage(DagsterPostgresStorage):
    """Dagster's own class with the address and driver from `orchestration.defs.event_storage`."""

    @classmethod
    def config_type(cls) -> Any:
        return {}

    @classmethod
    def from_config_value(cls, inst_data: Any, config_value: Any) -> "PostgresStorage":
        return cls(postgres_url=address().render_as_string(hide_password=False), inst_data=inst_data)
