"""A `Source`: a table of records with random access, and what is done to any of them.

Small sets of pictures are decoded once and held as arrays; everything else stays
encoded until it is asked for.
"""

import dataclasses
import logging
import os
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np

from clj.cli import UserError
from clj.data import images
from clj.data.order import order
from clj.data.text import Tokenizer


class DataError(UserError):
  """What only the user can mend; the message is one line with the way out."""


class Text(NamedTuple):
  """Captions of a source in memory; record i has rows first[i] to first[i + 1].

  ids: int32 [M, L]. mask: bool [M, L]. first: int64 [N + 1].
  """

  ids: np.ndarray
  mask: np.ndarray
  first: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """Records 0 to `len(source) - 1`.

  Attributes:
    name: what `open_source` was asked for, with the split.
    size: number of records.
    keys: batch keys that it gives: "index", "image", "label" where there are any, and
      "text" with "text_mask" once it is `tokenized`.
    class_names: a name for each label, or None.
    arrays: the records as arrays with a leading axis of `size`, `image` uint8
      [N, H, W, 3] and `label` int32 [N] among them; None for a source that is read
      record by record. Only what `keys` names goes into batches.
    read: `indices -> list of {"image": bytes, "label": int, "id": str}`, the pictures
      encoded; a record that cannot be read comes as the exception. None where there are
      arrays. With `captioned`, "caption" is a list of strings. "path" is there where
      the picture is a file of its own.
    files: path of each record, where each is a file of its own; else None.
    bad: the corrupt records met so far, index -> reason.
    captioned: whether it was opened with captions.
    captions: those of each record, a list of strings; None where there are no arrays.
    tokenizer: what makes them ids, in a source that is `tokenized`.
    text: the ids, where there are arrays.
    truncated: share of the captions that the tokenizer cuts; of a sample where they
      are streamed.
  """

  name: str
  size: int
  keys: tuple[str, ...]
  class_names: tuple[str, ...] | None = None
  arrays: dict[str, np.ndarray] | None = None
  read: Callable[[Sequence[int]], list] | None = None
  files: tuple[str, ...] | None = None
  bad: dict[int, str] = dataclasses.field(default_factory=dict)
  captioned: bool = False
  captions: Sequence[list[str]] | None = None
  tokenizer: Tokenizer | None = None
  text: Text | None = None
  truncated: float = 0.0
  _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

  def __len__(self):
    return self.size

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


def captions_of(source: Source, limit: int = 100_000) -> Iterator[str]:
  """The captions of up to `limit` records: all of them, or a sample, always the same.

  What cannot be read is left out.
  """
  records = np.arange(min(limit, len(source)))
  if limit < len(source):
    records = np.sort(order(0, records, len(source)))
  if source.captions is not None:
    for i in records:
      yield from source.captions[i]
    return
  for block in np.array_split(records, max(1, len(records) // 256)):
    for record in source.read(block):
      if not isinstance(record, Exception):
        yield from record["caption"]


def tokenized(source: Source, tokenizer: Tokenizer) -> Source:
  """A source that gives "text" and "text_mask" too.

  In memory, the captions become ids here, once; else where they are streamed.

  Raises:
    DataError: the source has no captions.
  """
  if not source.captioned:
    raise DataError(f"{source.name} has no captions; leave data.text out")
  keys = (*source.keys, "text", "text_mask")
  if source.captions is None:
    sample = list(captions_of(source, 2048))
    _, _, cut = tokenizer.encode(sample)
    share = cut / max(1, len(sample))
    return dataclasses.replace(source, keys=keys, tokenizer=tokenizer, truncated=share)
  ids, mask, cut = tokenizer.encode([c for each in source.captions for c in each])
  first = np.cumsum([0, *map(len, source.captions)])
  return dataclasses.replace(
    source,
    keys=keys,
    tokenizer=tokenizer,
    text=Text(ids, mask, first),
    truncated=cut / len(ids),
  )


def load(source: Source, shape: tuple[int, int]) -> Source:
  """Decodes a source into arrays of pictures of one shape (height, width).

  A picture of another shape is resized and cut; see `images.fit`. A corrupt record
  becomes a copy of the next good one, its `index` included.
  """
  size, block = len(source), 1024
  arrays = {
    "index": np.arange(size, dtype=np.int32),
    "image": np.empty((size, *shape, 3), np.uint8),
    "label": np.empty(size, np.int32),
  }
  captions = [[]] * size

  def fill(start):
    indices = range(start, min(start + block, size))
    for i, record in zip(indices, source.read(indices)):
      try:
        picture = decode(source, record)
        arrays["image"][i] = images.fit(picture, *shape)
        arrays["label"][i] = record["label"]
        captions[i] = record.get("caption", [])
      except Exception as error:
        source.report_bad(i, error)

  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(fill, range(0, size, block)))
  for i in source.bad:
    good = i
    while good in source.bad:
      good = (good + 1) % size
    for array in arrays.values():
      array[i] = array[good]
    captions[i] = captions[good]
  arrays = {key: arrays[key] for key in source.keys}
  captions = captions if source.captioned else None
  return dataclasses.replace(source, arrays=arrays, read=None, captions=captions)


def decode(source: Source, record) -> np.ndarray:
  """The picture of a record as it was read, uint8 [H, W, 3].

  Raises:
    Exception: the record could not be read, or it lacks a caption.
    ValueError: the picture is broken.
  """
  if isinstance(record, Exception):
    raise record
  if source.captioned and not record["caption"]:
    raise UserError("it has no caption")
  return images.decode(record["image"])


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


def first_line(error):
  """The first line of an exception's message."""
  return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


def keys_of(labelled):
  return ("index", "image", "label") if labelled else ("index", "image")
