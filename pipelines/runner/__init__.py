"""The stage runner: requests, units of work, resume, locks, publication, and finished outputs as inputs."""
