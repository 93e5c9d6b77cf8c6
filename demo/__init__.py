"""A laptop-sized world to run the whole graph on: drawn scenes with exact ground truth, a mini web, tiny models."""
