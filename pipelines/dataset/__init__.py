"""Stage `dataset`: the table of all samples, deduplication, training order, and a resumable sample stream."""
