"""Batches in the order of `clj.data.order`, from memory or decoded as they come.

Row r of step s is position `s * batch_size + r` of the stream, in 64 bits, and what is
drawn at random for it is keyed by (seed, position, view). So the step number is all the
state there is, and neither a restart nor the number of hosts, processes or threads
changes a single pixel.
"""

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from clj.cli import UserError
from clj.data import images
from clj.data.order import mix, order
from clj.data.source import Source, decode

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
    accelerator), else crops [b, views, size, size, 3]. Of a source that is tokenized
    also `text` int32 [b, L] and `text_mask` bool [b, L], True at real tokens; where a
    record has several captions, one is drawn.

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
    lambda position, count: int(_draw(seed, position, count)),
    (views, size, size, 3),
    threads=threads,
  )


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  size: int,
  crop: float = 0.875,
  rows: tuple[int, int] | None = None,
  threads: int | None = None,
) -> Iterator[Batch]:
  """Every record once, in the order of the data set.

  Args:
    source: what to read.
    batch_size: rows of the global batch.
    size, crop: side of the pictures, and share of the shorter side that is kept; see
      `images.crop_centrally`.
    rows: first row and end of the rows of each global batch to give; None: all.
    threads: that decode; None: one a processor.

  Returns:
    An iterator with `close()`, as `batches`, with `image` uint8 [b, 1, size, size, 3].
    All batches have the same shape on every host: the last one is filled up with rows
    whose `index` and `label` are -1. A corrupt record is such a row too. `text` is the
    first caption; see `caption_batches` for all.
  """
  first, stop = _rows(rows, batch_size)

  def positions(number):
    rows = number * batch_size + np.arange(first, stop)
    return np.where(rows < len(source), rows, -1)

  return _stream(
    source,
    positions,
    lambda positions: positions,
    lambda position, picture: images.crop_centrally(picture, size, crop)[None],
    lambda position, count: 0,
    (1, size, size, 3),
    count=-(-len(source) // batch_size),
    replace=False,
    threads=threads,
  )


def caption_batches(
  source: Source, *, batch_size: int, rows: tuple[int, int] | None = None
) -> Iterator[Batch]:
  """Every caption of every record once, for evaluation.

  Returns:
    An iterator over dicts of `text` int32 [b, L], `text_mask` bool [b, L] and `index`
    int32 [b], the record that the caption belongs to; -1 in rows that fill up the last
    batch.
  """
  first, stop = _rows(rows, batch_size)
  ids, mask, index = _all_captions(source)
  for start in range(0, len(index), batch_size):
    mine = slice(start + first, start + stop)
    fill = stop - first - len(index[mine])
    pad = lambda array, value, f=fill: np.pad(
      array, [(0, f)] + [(0, 0)] * (array.ndim - 1), constant_values=value
    )
    yield {
      "text": pad(ids[mine], source.tokenizer.pad_id),
      "text_mask": pad(mask[mine], False),
      "index": pad(index[mine], -1),
    }


def record_batches(
  source: Source,
  records: Sequence[range],
  *,
  batch_size: int,
  size: int | None,
  crop: float = 0.875,
  threads: int | None = None,
) -> Iterator[tuple[np.ndarray | None, list]]:
  """What is known of given records, and their pictures, each record in its own row.

  Args:
    source: what to read.
    records: of each batch, at most `batch_size`; they may be any of the source's.
    batch_size: rows of the pictures.
    size, crop: as in `eval_batches`; size None: no pictures.
    threads: that decode; None: one a processor.

  Returns:
    An iterator with `close()`, over pairs: pictures uint8 [batch_size, 1, size, size,
    3], and a list of the records, without their pictures: "id", "label", "caption"
    where there are any, "path" where it is a file. A corrupt record is the exception
    in this list, and its row, as those that fill up the batch, is black. A record
    without a caption is none the worse.
  """
  chunks = -(-batch_size // _CHUNK)

  def chunk(element):
    number, part = divmod(element, chunks)
    mine = records[number][part * _CHUNK : (part + 1) * _CHUNK]
    rows = min(_CHUNK, batch_size - part * _CHUNK)
    pictures = None if size is None else np.zeros((rows, 1, size, size, 3), np.uint8)
    found = read_records(source, mine) if mine else []
    for row, record in enumerate(found):
      if isinstance(record, Exception):
        continue
      try:
        picture = record.pop("image")
        if size is not None:
          picture = images.decode(picture) if isinstance(picture, bytes) else picture
          pictures[row, 0] = images.crop_centrally(picture, size, crop)
      except Exception as error:
        found[row] = error
    return pictures, found

  for parts in _threaded(chunk, chunks, len(records), threads or os.cpu_count()):
    pictures = None if size is None else np.concatenate([p for p, _ in parts])
    yield pictures, [record for _, found in parts for record in found]


def read_records(source: Source, indices: Sequence[int]) -> list:
  """Records as `Source.read` gives them; those in memory with their picture decoded."""
  if source.arrays is None:
    return source.read(indices)
  arrays, captions = source.arrays, source.captions
  return [
    {"image": arrays["image"][i], "label": arrays["label"][i], "id": str(i)}
    | ({"caption": captions[i]} if captions else {})
    for i in indices
  ]


@functools.lru_cache(maxsize=2)  # what is streamed is read for its captions once
def _all_captions(source):
  """ids [M, L], mask [M, L] and record [M] of every caption of a source."""
  if source.text is not None:
    ids, mask, first = source.text
    index = np.repeat(source.arrays["index"], np.diff(first))
    # What stands in for a corrupt record has its captions already.
    own = np.repeat(np.arange(len(source)), np.diff(first)) == index
    return ids[own], mask[own], index[own]
  captions, index = [], []
  for block in np.array_split(np.arange(len(source)), -(-len(source) // 256)):
    for i, record in zip(block, source.read(block)):
      said = [] if isinstance(record, Exception) else record["caption"]
      captions += said
      index += [i] * len(said)
  ids, mask, _ = source.tokenizer.encode(captions)
  return ids, mask, np.array(index, np.int32)


def _rows(rows, batch_size):
  first, stop = (0, batch_size) if rows is None else rows
  if not 0 <= first < stop <= batch_size:
    raise UserError(f"rows {rows} do not lie in a batch of {batch_size}")
  return first, stop


def _draw(seed, positions, counts):
  """Which of `counts` captions a record gives at a position of the stream."""
  return (mix(seed, positions, -1) % np.asarray(counts, np.uint64)).astype(np.int64)


def _gather(source, seed, batch_size, step, first, stop):
  """Batches of a source in memory: one look-up for many batches, one gather each."""
  together = max(1, _LOOKAHEAD // (stop - first))
  while True:
    steps = np.arange(step, step + together, dtype=np.int64)
    positions = steps[:, None] * batch_size + np.arange(first, stop)
    for where, records in zip(positions, order(seed, positions, len(source))):
      batch = {key: array.take(records, axis=0) for key, array in source.arrays.items()}
      batch["image"] = batch["image"][:, None]
      if source.text is not None:
        row, end = source.text.first[records], source.text.first[records + 1]
        row += _draw(seed, where, end - row)
        batch["text"] = source.text.ids.take(row, axis=0)
        batch["text_mask"] = source.text.mask.take(row, axis=0)
      yield {key: batch[key] for key in source.keys}
    step += together


def _stream(
  source: Source,
  positions: Callable,
  record_of: Callable,
  picture_of: Callable,
  caption_of: Callable,
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
    caption_of: (position, number of captions) -> which of them.
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
    said = []  # (row, caption)
    for row, (index, record) in zip(filled, _fetch(source, records, replace)):
      if record is None:
        continue
      position = int(where[row])
      batch["index"][row] = index
      batch["label"][row] = record["label"]
      batch["image"][row] = picture_of(position, record["image"])
      if source.text is not None:
        start, end = source.text.first[index : index + 2]
        caption = start + caption_of(position, end - start)
        batch["text"][row] = source.text.ids[caption]
        batch["text_mask"][row] = source.text.mask[caption]
      elif source.tokenizer is not None:
        captions = record["caption"]
        said.append((row, captions[caption_of(position, len(captions))]))
    if said:
      rows, captions = zip(*said)
      ids, mask, _ = source.tokenizer.encode(captions)
      batch["text"][list(rows)], batch["text_mask"][list(rows)] = ids, mask
    return batch

  for parts in _threaded(chunk, chunks, count, threads):
    yield {key: np.concatenate([p[key] for p in parts]) for key in source.keys}


def _threaded(chunk: Callable, chunks: int, count: int | None, threads: int):
  """Yields `count` lists (None: no end) of `chunks` results of `chunk(element)` each.

  Threads: OpenCV, Pillow and the readers release the GIL, and worker processes would
  have to be found and ended when the parent is killed.
  """
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
      yield [next(iterator) for _ in range(chunks)]
  finally:
    iterator.close()


def _empty(source, rows, shape):
  batch = {
    "index": np.full(rows, -1, np.int32),
    "image": np.zeros((rows, *shape), np.uint8),
    "label": np.full(rows, -1, np.int32),
  }
  if source.tokenizer is not None:
    text = (rows, source.tokenizer.length)
    batch["text"] = np.full(text, source.tokenizer.pad_id, np.int32)
    batch["text_mask"] = np.zeros(text, bool)
  return batch


def _fetch(source, records, replace):
  """Yields (index, record with its picture decoded) of each; None for a corrupt one."""
  if source.arrays is not None:
    arrays = source.arrays
    for index in records:
      # A stand-in for a corrupt record has an index of its own.
      good = replace or arrays["index"][index] == index
      label = arrays["label"][index] if "label" in arrays else -1
      yield index, {"image": arrays["image"][index], "label": label} if good else None
    return
  for index, record in zip(records.tolist(), source.read(records)):
    record = _decoded(source, index, record)
    while record is None and replace:
      index = (index + 1) % len(source)
      record = _decoded(source, index, source.read([index])[0])
    yield index, record


def _decoded(source, index, record):
  """A record as it was read, its picture decoded; None, and counted, if corrupt."""
  try:
    return record | {"image": decode(source, record)}
  except Exception as error:
    source.report_bad(index, error)
  return None
