"""Ray for the data stages: one way to start or join a cluster, and units of work spread over its nodes."""
