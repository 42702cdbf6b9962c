"""Benchmarks: scripts that measure what docs/results reports. Nothing imports this package."""
