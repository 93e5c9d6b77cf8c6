"""Losses that training must go on giving."""
