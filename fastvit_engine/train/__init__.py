"""The training loop, and what starts, measures and heals it.

`fastvit_engine.train(config, out, resume=False, data=None)` trains a model in this process: see
`fastvit_engine.api.train`.
"""

from fastvit_engine.callable_package import make_callable

make_callable(__name__)
