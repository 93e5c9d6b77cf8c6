"""Benchmark prompts and the images generated for them: published file formats, stages `prompt_sets` and `samples`."""
