"""Stage `images`: fetching under limits and opt-outs, decoding in worker processes, resizing, a status for each row."""
