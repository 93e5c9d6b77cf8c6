"""Stage `images`: polite fetching with limits and opt-outs, decoding in worker processes, and a status per row."""
