"""The rules of records, keys and payloads: pure, without a clock, loop, randomness, environment, logger or I/O."""
