"""Samples images from a checkpoint, with the text computed once for all steps."""
