"""Public benchmarks: lmms-eval asks a checkpoint through a relay, and bench.json keeps every sample."""
