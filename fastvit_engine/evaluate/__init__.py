"""How good a model is: evaluations that the training loop runs, or a program of your own.

`fastvit_engine.evaluate(model, data)` measures the accuracy of a model: see `fastvit_engine.api.evaluate`.
"""

from fastvit_engine.callable_package import make_callable

make_callable(__name__)
