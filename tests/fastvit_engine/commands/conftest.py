from tests.fastvit_engine.observe.conftest import make_run

__all__ = ["make_run"]  # a fixture
