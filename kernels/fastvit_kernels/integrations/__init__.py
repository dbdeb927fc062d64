from fastvit_kernels.integrations.acceleration import Acceleration, Row, accelerate

__all__ = ["Acceleration", "Row", "accelerate"]
