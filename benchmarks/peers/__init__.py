"""The other libraries' sides. Each file runs in the environment that `benchmarks.peers.environment` makes."""
