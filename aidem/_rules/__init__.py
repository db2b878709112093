"""What records, keys and payloads mean: pure rules, without a clock, a loop, randomness, environment, logger or I/O."""
