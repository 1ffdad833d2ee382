"""Imported by the server that forks the processes of the kill tests: a collection before they start.

pyarrow imports pandas and its dataset reader at their first use, which takes longer than a whole collection; without
this every kill would hit an import.
"""

import tempfile

import s3fs  # noqa: F401 - for the kill test on a store

from tests.shared.dataset.test_kill import collect

with tempfile.TemporaryDirectory() as folder:
    collect(f"{folder}/dataset")
