"""Claims about speed. Each is measured beside the stock path: `python -P -m benchmarks.<name>`."""
