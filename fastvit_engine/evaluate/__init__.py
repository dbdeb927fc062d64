"""How good a model is: evaluations that the training loop runs, or a program of your own."""
