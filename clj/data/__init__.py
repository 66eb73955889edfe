"""Data sets and batches: NumPy in, NumPy out."""

from clj.data.dataset import Data, Split, expected_spec, open_data
from clj.data.source import DataError, Source, Want
from clj.data.sources import open_source

__all__ = [
  "Data",
  "DataError",
  "Source",
  "Split",
  "Want",
  "expected_spec",
  "open_data",
  "open_source",
]
