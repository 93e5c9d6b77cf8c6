"""The Dagster graph, the plan behind it, launchers, profiles, audit and the command line."""
