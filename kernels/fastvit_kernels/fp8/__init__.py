"""Linear layers of Transformer blocks whose three products are of 8-bit floating-point numbers."""
