from tests.train.conftest import cache

__all__ = ["cache"]
