"""Stage `checkpoint`: the training loop, snapshots, parallelism, metrics, trackers."""
