"""Stage `dataset`: the table of all samples, training order, near-duplicates, and a resumable sample stream."""
