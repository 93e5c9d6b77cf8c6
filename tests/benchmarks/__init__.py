"""Benchmarks: each compares two ways side by side in one run and prints the ratio. Never part of the tests."""
