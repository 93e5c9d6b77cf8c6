"""Dagster's storage in the PostgreSQL that the environment names; dagster.yaml names the class."""

from typing import Any

from dagster_postgres import DagsterPostgresStorage

from orchestration.defs.event_storage import address


class PostgresStorage(DagsterPostgresStorage):
    """Dagster's own storage, with the address and the driver that `orchestration.defs.event_storage` chose."""

    @classmethod
    def config_type(cls) -> Any:
        return {}

    @classmethod
    def from_config_value(cls, inst_data: Any, config_value: Any) -> "PostgresStorage":
        return cls(postgres_url=address().render_as_string(hide_password=False), inst_data=inst_data)
