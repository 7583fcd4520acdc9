"""Is it the same network? Cases, comparison, tolerances, verdict: the one proof."""
