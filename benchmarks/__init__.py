"""Claims about speed, each measured side by side with the stock path: `python -P -m benchmarks.<name>`."""
