"""Models and conversations that are made on the spot, shared by examples, benchmarks and tests: no network, no GPU."""
