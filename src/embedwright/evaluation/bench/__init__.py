"""Published benchmarks by name: MTEB and AIR-Bench, beside published scores."""
