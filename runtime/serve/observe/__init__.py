"""What an operator sees: counters, metrics, the access log, traces."""
