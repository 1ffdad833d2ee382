from __future__ import annotations

from tests.fixtures.hub import hub_server
from tests.fixtures.s3 import s3

__all__ = ["hub_server", "s3"]
