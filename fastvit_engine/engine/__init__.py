"""DeepSpeed behind an interface of our own: its configuration, its state, and the average of the weights."""
