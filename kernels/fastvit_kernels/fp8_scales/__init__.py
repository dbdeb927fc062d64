"""Scales of 8-bit floating-point operands, and what passes over matrices leave for them."""
