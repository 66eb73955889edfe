"""Data sets and batches: NumPy in, NumPy out."""

from clj.data.sources import DataError, Source, open_source

__all__ = ["DataError", "Source", "open_source"]
