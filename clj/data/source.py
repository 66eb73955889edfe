"""A `Source`: a table of records with random access, whatever is in them.

A record is a dict, by column, of what was stored: the bytes of a file, a string or
several, a number, an array. What becomes of it is the business of `clj.data.columns`.
"""

import dataclasses
import logging
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from clj.cli import UserError
from clj.data.order import order

# What a record is called, and the file that it is, beside the columns of a record.
KEY, PATH = "__key__", "__path__"
_BLOCK = 256  # records that are read at a time


class DataError(UserError):
  """What only the user can mend; the message is one line with the way out."""


class Want(NamedTuple):
  """What a column asks of a source.

  field: its name there. kind: of the column. optional: whether a source may lack it.
  where: the key of the config that names it.
  """

  field: str
  kind: str
  optional: bool = False
  where: str = ""

  @property
  def content(self) -> bool:
    """Whether a path in a table stands for the file that it leads to."""
    return self.kind in ("image", "audio")


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """Records 0 to `len(source) - 1`.

  Attributes:
    name: what `open_source` was asked for, with the split.
    size: number of records.
    gives: the columns of its records.
    reader: `(indices, columns) -> list of records`, a record that cannot be read as the
      exception. A record has KEY, its name, and PATH where it is a file of its own;
      None stands for what is empty, and a column that the record cannot have is not in
      it. None where there are arrays.
    arrays: the records of a source that is held in memory as it is, [N, ...] or a list
      by column.
    class_names: a name for each number of a column of classes.
    shapes: of the values of a column, where all have the same and it is known.
    files: path of each record, where each is a file of its own; else None.
    constants: arrays that every step needs whole, by key.
    ordering: `(seed, positions) -> records`; None: `clj.data.order.order`.
    bad: the corrupt records met so far, index -> reason.
  """

  name: str
  size: int
  gives: tuple[str, ...]
  reader: Callable[[Sequence[int], Sequence[str]], list] | None = None
  arrays: dict[str, np.ndarray | list] | None = None
  class_names: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  shapes: dict[str, tuple] = dataclasses.field(default_factory=dict)
  files: tuple[str, ...] | None = None
  constants: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  ordering: Callable | None = None
  bad: dict[int, str] = dataclasses.field(default_factory=dict)
  _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

  def __len__(self):
    return self.size

  def at(self, seed: int, positions) -> np.ndarray:
    """The records at positions of the endless training stream, int64."""
    if self.ordering is None:
      return order(seed, positions, self.size)
    return self.ordering(seed, np.asarray(positions, np.int64))

  def read(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list:
    """Records, or for what cannot be read the exception. columns: None: all."""
    columns = self.gives if columns is None else [c for c in columns if c in self.gives]
    if self.arrays is None:
      return self.reader(indices, columns)
    return [{KEY: str(i)} | {c: self.arrays[c][i] for c in columns} for i in indices]

  def values(self, column: str, limit: int | None = None) -> Iterator[tuple]:
    """(index, value) of a column: of all that can be read, or of a sample of `limit`.

    The sample is always the same.
    """
    records = np.arange(min(limit or self.size, self.size))
    if len(records) < self.size:
      records = np.sort(order(0, records, self.size))
    for block in np.array_split(records, max(1, len(records) // _BLOCK)):
      block = block.tolist()
      for i, record in zip(block, self.read(block, [column])):
        if not isinstance(record, Exception) and column in record:
          yield i, record[column]

  def report_bad(self, index: int, error: Exception) -> None:
    """Counts a corrupt record, once, and says so.

    Raises:
      DataError: more than max(10, 0.1 %) of the records are corrupt, or all.
    """
    with self._lock:
      known = index in self.bad
      if not known:
        reason = first_line(error).split(";")[0][:200]
        if self.files:
          reason = f"{self.files[index]}: {reason}"
        self.bad[index] = reason
      count, limit = len(self.bad), max(10, self.size // 1000)
      # Known or not: another thread may be looking for a good record in vain.
      if count > limit or count == self.size:
        raise DataError(
          f"{self.name}: {count} of {self.size} records are corrupt, one of them record"
          f" {index} ({self.bad[index]}); a run puts up with"
          f" {min(limit, self.size - 1)}: mend or remove them"
        )
      if not known:
        logging.getLogger(__name__).warning(
          "%s: record %d is corrupt (%s), the next good one stands in; %d so far",
          self.name,
          index,
          reason,
          count,
        )


def split_parts(split, sizes, name):
  """Resolves a split in TFDS's syntax to [(split name, start, stop)]."""
  if split in sizes:
    return [(split, 0, sizes[split])]
  import tensorflow_datasets as tfds

  try:
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(
      {key: types.SimpleNamespace(num_examples=n) for key, n in sizes.items()}
    )
  except (ValueError, KeyError, AssertionError) as error:
    raise DataError(no_split(name, split, sizes, error)) from None
  return [(p.splitname, p.from_ or 0, sizes[p.splitname] if p.to is None else p.to)
          for p in parts]  # fmt: skip


def no_split(name, split, splits, error):
  return (
    f"{name} has no split {split!r} ({first_line(error)}); it has: {', '.join(splits)}"
  )


def lacking(name: str, wants: dict[str, Want], there: Sequence[str], kind="field"):
  """Refuses wanted fields that are not `there`; returns the wants that are.

  Raises:
    DataError: names the field, the key that asks for it, and what there is.
  """
  for want in wants.values():
    if want.field not in there and not want.optional:
      where = f" ({want.where})" if want.where else ""
      raise DataError(
        f"{name} has no {kind} {want.field!r}{where}; it has: {', '.join(there)}"
      )
  return {column: want for column, want in wants.items() if want.field in there}


def first_line(error):
  """The first line of an exception's message."""
  return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


def plain_text(value) -> str:
  """A string, from bytes by their byte order mark, else as UTF-8; nothing raises."""
  if isinstance(value, bytes):
    marks = {
      b"\xff\xfe": "utf-16",
      b"\xfe\xff": "utf-16",
      b"\xef\xbb\xbf": "utf-8-sig",
    }
    codec = next((c for mark, c in marks.items() if value.startswith(mark)), "utf-8")
    return value.decode(codec, errors="replace")
  return str(value).encode("utf-8", "replace").decode()
