"""Benchmarks: each measures our path beside the stock path. Run `python -P -m benchmarks.<name>`."""
