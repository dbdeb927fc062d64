"""The samples of every step, in an exact order, and the loaders that turn them into batches."""
