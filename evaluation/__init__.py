"""Evaluation: benchmark prompts, samples, judges, scores with intervals, analyses and the report."""
