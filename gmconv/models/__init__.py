"""Network zoo."""
