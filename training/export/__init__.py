"""A checkpoint as a diffusers pipeline: stage `pipeline_export`."""
