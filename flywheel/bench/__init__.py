"""Benchmarks that need more than the edge: real services, every stage, other people's software.

Each is a function ``(full: bool) -> dict`` that returns the document of ``flywheel bench --json``.
"""
