"""Batches in the order of `clj.data.order`, from memory or decoded as they come.

Row r of step s is position `s * batch_size + r` of the stream, in 64 bits, and what is
drawn at random for it is keyed by (seed, position, view). So the step number is all the
state there is, and neither a restart nor the number of hosts, processes or threads
changes a single pixel.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator

import grain
import numpy as np

from clj.data import images
from clj.data.order import order
from clj.data.sources import Source

# Positions whose records are looked up in one call: enough to pay NumPy's overhead.
_LOOKAHEAD = 8192
# Rows that one thread reads and decodes at a time.
_CHUNK = 16
Batch = dict[str, np.ndarray]


def batches(
  source: Source,
  *,
  seed: int,
  batch_size: int,
  step: int = 0,
  rows: tuple[int, int] | None = None,
  size: int,
  views: int,
  scale: tuple[float, float],
  ratio: tuple[float, float],
  threads: int | None = None,
) -> Iterator[Batch]:
  """Training batches without end.

  Args:
    source: what to read.
    seed: any integer; decides order and crops.
    batch_size: rows of the global batch.
    step: number of the first batch.
    rows: first row and end of the rows of each global batch to give; None: all.
    size: side of a streamed crop in pixels.
    views: streamed crops a picture, each drawn by itself.
    scale: least and greatest part of the picture's area in a streamed crop.
    ratio: least and greatest width / height of it.
    threads: that decode; None: one a processor.

  Returns:
    An iterator with `close()`, over dicts of the source's keys with b rows: `index`
    int32 [b], `label` int32 [b] (-1: none), and `image` uint8, the whole stored picture
    [b, 1, H, W, 3] where the source is held in memory (it is cropped on the
    accelerator), else crops [b, views, size, size, 3].

  Raises:
    ValueError: `rows` outside the batch.
    DataError: from the iterator, when too many records are corrupt.
  """
  first, stop = _rows(rows, batch_size)
  if source.arrays is not None:
    return _gather(source, seed, batch_size, step, first, stop)

  def picture_of(position, picture):
    chances = images.crop_chances(seed, position, views)
    crops = [images.crop_randomly(picture, size, c, scale, ratio) for c in chances]
    return np.stack(crops)

  return _stream(
    source,
    lambda number: (step + number) * batch_size + np.arange(first, stop),
    lambda positions: order(seed, positions, len(source)),
    picture_of,
    (views, size, size, 3),
    threads=threads,
  )


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  size: int,
  rows: tuple[int, int] | None = None,
  threads: int | None = None,
) -> Iterator[Batch]:
  """Every record once, in the order of the data set.

  Args:
    source: what to read.
    batch_size: rows of the global batch.
    size: side of the pictures; see `images.crop_centrally`.
    rows: first row and end of the rows of each global batch to give; None: all.
    threads: that decode; None: one a processor.

  Returns:
    An iterator with `close()`, as `batches`, with `image` uint8 [b, 1, size, size, 3].
    All batches have the same shape on every host: the last one is filled up with rows
    whose `index` and `label` are -1. A corrupt record is such a row too.
  """
  first, stop = _rows(rows, batch_size)

  def positions(number):
    rows = number * batch_size + np.arange(first, stop)
    return np.where(rows < len(source), rows, -1)

  return _stream(
    source,
    positions,
    lambda positions: positions,
    lambda position, picture: images.crop_centrally(picture, size)[None],
    (1, size, size, 3),
    count=-(-len(source) // batch_size),
    replace=False,
    threads=threads,
  )


def _rows(rows, batch_size):
  first, stop = (0, batch_size) if rows is None else rows
  if not 0 <= first < stop <= batch_size:
    raise ValueError(f"rows {rows} do not lie in a batch of {batch_size}")
  return first, stop


def _gather(source, seed, batch_size, step, first, stop):
  """Batches of a source in memory: one look-up for many batches, one gather each."""
  together = max(1, _LOOKAHEAD // (stop - first))
  while True:
    steps = np.arange(step, step + together, dtype=np.int64)
    positions = steps[:, None] * batch_size + np.arange(first, stop)
    for records in order(seed, positions, len(source)):
      batch = {key: source.arrays[key].take(records, axis=0) for key in source.keys}
      batch["image"] = batch["image"][:, None]
      yield batch
    step += together


def _stream(
  source: Source,
  positions: Callable,
  record_of: Callable,
  picture_of: Callable,
  shape: tuple[int, ...],
  *,
  count: int | None = None,
  replace: bool = True,
  threads: int | None,
):
  """Batches whose pictures are made one by one, by Grain's threads, a chunk at a time.

  Args:
    positions: number of the batch -> positions [b]; -1 is an empty row.
    record_of: positions -> records.
    picture_of: (position, decoded picture) -> picture of `shape`.
    count: number of batches; None: no end.
    replace: the next good record stands in for a corrupt one; else its row is empty.
  """
  threads = threads or os.cpu_count()
  rows = len(positions(0))
  chunks = -(-rows // _CHUNK)

  def chunk(element):
    number, part = divmod(element, chunks)
    where = positions(number)[part * _CHUNK : (part + 1) * _CHUNK]
    filled = np.flatnonzero(where >= 0)
    batch = _empty(source, len(where), shape)
    records = record_of(where[filled])
    for row, (index, label, picture) in zip(filled, _fetch(source, records, replace)):
      if picture is not None:
        batch["index"][row] = index
        batch["label"][row] = label
        batch["image"][row] = picture_of(int(where[row]), picture)
    return batch

  # Threads: OpenCV, Pillow and the readers release the GIL, and worker processes would
  # have to be found and ended when the parent is killed.
  total = sys.maxsize if count is None else count * chunks
  ahead = max(2 * chunks, 2 * threads)
  dataset = grain.MapDataset.range(total).map(chunk)
  iterator = iter(
    dataset.to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    )
  )
  try:
    for _ in itertools.count() if count is None else range(count):
      parts = [next(iterator) for _ in range(chunks)]
      yield {key: np.concatenate([p[key] for p in parts]) for key in source.keys}
  finally:
    iterator.close()


def _empty(source, rows, shape):
  return {
    "index": np.full(rows, -1, np.int32),
    "image": np.zeros((rows, *shape), np.uint8),
    "label": np.full(rows, -1, np.int32),
  }


def _fetch(source, records, replace):
  """Yields (index, label, decoded picture) of each record; None for a corrupt one."""
  if source.arrays is not None:
    arrays = source.arrays
    for record in records:
      # A stand-in for a corrupt record has an index of its own.
      good = replace or arrays["index"][record] == record
      label = arrays["label"][record] if "label" in arrays else -1
      yield record, label, arrays["image"][record] if good else None
    return
  for index, record in zip(records.tolist(), source.read(records)):
    picture = _decode(source, index, record)
    while picture is None and replace:
      index = (index + 1) % len(source)
      record = source.read([index])[0]
      picture = _decode(source, index, record)
    yield index, -1 if picture is None else record["label"], picture


def _decode(source, index, record):
  """The picture of a record as it was read; None, and counted, where it is corrupt."""
  try:
    if isinstance(record, Exception):
      raise record
    return images.decode(record["image"])
  except Exception as error:
    source.report_bad(index, error)
  return None
