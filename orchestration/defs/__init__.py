"""Everything that imports dagster: assets, checks, jobs, metadata, instance and storage."""
