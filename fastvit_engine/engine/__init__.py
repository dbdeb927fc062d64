"""The engine that trains: a typed interface, DeepSpeed behind it, optimizers, and the average of the weights."""
