from __future__ import annotations

from tests.fixtures.s3 import s3

__all__ = ["s3"]
