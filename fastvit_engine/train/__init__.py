"""The training loop, and what starts, measures and heals it."""

from fastvit_engine.callable_package import make_callable

make_callable(__name__)
