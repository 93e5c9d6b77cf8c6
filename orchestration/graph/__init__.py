"""The asset graph, its nodes, and the resolution of each task's configuration, inputs and state."""
