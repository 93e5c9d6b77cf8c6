"""Losses that training must reproduce."""
