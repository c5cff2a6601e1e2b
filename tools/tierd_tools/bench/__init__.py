"""Benchmarks: one file answers one question."""
