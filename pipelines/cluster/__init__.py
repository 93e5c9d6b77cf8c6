"""Ray for the data stages: starting or joining a cluster, and distributing units of work over its nodes."""
