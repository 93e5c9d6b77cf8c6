"""Six small real stages with the partition sets of the real graph, for trying the orchestration on them."""
