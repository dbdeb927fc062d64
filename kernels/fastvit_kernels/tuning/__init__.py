"""Launch parameters: measured on a GPU, compiled without one, and shipped as tables."""
