"""What is served: found, verified, configured, loaded, warmed up, replaced without a gap, closed."""
