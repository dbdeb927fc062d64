"""How good a model is: evaluations that the training loop runs, or a program of your own."""

from fastvit_engine.callable_package import make_callable

make_callable(__name__)
