"""Reference: slow and obvious twins of everything fast, imported by tests and benchmarks only."""
