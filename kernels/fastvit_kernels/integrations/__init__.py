"""`accelerate`: the operations of this package in models of other libraries, in place."""

from fastvit_kernels.integrations.acceleration import Acceleration, Row, accelerate, restore

__all__ = ["Acceleration", "Row", "accelerate", "restore"]
