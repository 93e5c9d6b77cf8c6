"""A laptop-sized world for the whole graph: rendered scenes with exact ground truth, a small web, tiny models."""
