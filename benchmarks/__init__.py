"""Benchmarks: one script per claim, one harness, one renderer; see README.md beside this file."""
