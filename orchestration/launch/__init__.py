"""Stage processes: how they are started, watched and ended."""
