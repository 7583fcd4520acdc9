"""Crops baked kernels to the taps that matter, and measures what that did."""
