"""Event loops, threads, signals and forks: what the rest is run by; it knows nothing of idempotency."""
