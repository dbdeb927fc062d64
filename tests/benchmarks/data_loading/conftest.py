from tests.fastvit_engine.conftest import photo, write_tar

__all__ = ["photo", "write_tar"]  # fixtures
