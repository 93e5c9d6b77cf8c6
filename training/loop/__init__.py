"""Stage `checkpoint`: flow matching, the training loop, snapshots, parallelism, metrics."""
