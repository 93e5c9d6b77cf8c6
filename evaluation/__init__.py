"""Prompt sets, sample generation, judges, scores with intervals, analyses and the report."""
