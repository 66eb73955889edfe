"""Batches in the order of a source, from memory or made as they come.

Row r of step s is position `s * batch_size + r` of the stream, in 64 bits, and what is
drawn at random for it is keyed by (seed, position). So the step number is all the state
there is, and neither a restart nor the number of hosts, processes or threads changes a
single bit. What the columns are made of, and how, nobody here knows.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import grain
import numpy as np

from clj.cli import UserError
from clj.data.columns import Column, MissingLibrary
from clj.data.source import KEY, PATH, Source

# Positions whose records are looked up in one call: enough to pay NumPy's overhead.
_LOOKAHEAD = 8192
# Rows that one thread reads and makes at a time.
_CHUNK = 16
Batch = dict[str, np.ndarray]


class Held(NamedTuple):
  """A source in memory.

  index: of each record, int32 [N]; that of the next good one where it is corrupt.
  arrays: by column, as its `pack` gives them. valid: by column, bool [N].
  """

  index: np.ndarray
  arrays: dict
  valid: dict[str, np.ndarray]


def load(source: Source, columns: Sequence[Column]) -> Held:
  """Makes what the columns hold of every record.

  A corrupt record becomes a copy of the next good one, its `index` included.
  """
  size, block = len(source), 1024
  held, valid = {}, {}
  for column in columns:
    like, ready = column.stored, (source.arrays or {}).get(column.name)
    valid[column.name] = np.zeros(size, bool)
    if like is None:
      held[column.name] = [None] * size
    elif _is_like(ready, like):  # as it is
      held[column.name], valid[column.name][:] = ready, True
    else:
      empty = column.fill.get(column.name, 0)
      held[column.name] = np.full((size, *like.shape), empty, like.dtype)
  todo = [c for c in columns if not valid[c.name].all()]

  def fill(start):
    indices = range(start, min(start + block, size))
    for i, record in zip(indices, source.read(indices, [c.name for c in todo])):
      try:
        for column, value in _each(todo, record):
          held[column.name][i] = column.store(value)
          valid[column.name][i] = True
      except MissingLibrary:
        raise
      except Exception as error:
        source.report_bad(i, error)

  if todo:
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      list(pool.map(fill, range(0, size, block)))
  index = np.arange(size, dtype=np.int32)
  for i in source.bad:
    good = i
    while good in source.bad:
      good = (good + 1) % size
    for array in (index, *held.values(), *valid.values()):
      array[i] = array[good]
  return Held(index, {c.name: c.pack(held[c.name]) for c in columns}, valid)


def _is_like(array, like):
  plain = isinstance(array, np.ndarray) and array.dtype == like.dtype
  return plain and array.shape[1:] == like.shape


def _each(columns, record):
  """(column, value) of those that a record has; raises what it is instead."""
  if isinstance(record, Exception):
    raise record
  return [(c, record[c.name]) for c in columns if c.name in record]


def batches(
  source: Source,
  columns: Sequence[Column],
  held: Held | None = None,
  *,
  seed: int,
  batch_size: int,
  step: int = 0,
  rows: tuple[int, int] | None = None,
  threads: int | None = None,
) -> Iterator[Batch]:
  """Training batches without end.

  Args:
    source: what to read.
    columns: what to make of it.
    held: the source in memory; None: it is read as it goes.
    seed: any integer; decides order, crops, and whatever else is drawn.
    batch_size: rows of the global batch.
    step: number of the first batch.
    rows: first row and end of the rows of each global batch to give; None: all.
    threads: that make what is read; None: one a processor.

  Returns:
    An iterator with `close()`, over dicts of `index` int32 [b] and the keys of the
    columns' `spec`; NAME_valid bool [b] of those that rows may lack.

  Raises:
    UserError: `rows` outside the batch.
    DataError: from the iterator, when too many records are corrupt.
  """
  first, stop = _rows(rows, batch_size)
  if held is not None:
    return _gather(source, columns, held, seed, batch_size, step, first, stop)
  return _stream(
    lambda number: (step + number) * batch_size + np.arange(first, stop),
    _reader(source, columns, seed),
    columns,
    [c.spec for c in columns],
    threads=threads,
  )


def eval_batches(
  source: Source,
  columns: Sequence[Column],
  held: Held | None = None,
  *,
  batch_size: int,
  rows: tuple[int, int] | None = None,
  threads: int | None = None,
) -> Iterator[Batch]:
  """Every record once, in the order of the data set.

  Returns:
    An iterator with `close()`, as `batches`, of the columns' `test_spec`. All batches
    have the same shape on every host: the last one is filled up with rows whose `index`
    is -1. A corrupt record is such a row too.
  """
  first, stop = _rows(rows, batch_size)

  def positions(number):
    mine = number * batch_size + np.arange(first, stop)
    return np.where(mine < len(source), mine, -1)

  return _stream(
    positions,
    _reader(source, columns) if held is None else _holder(columns, held),
    columns,
    [c.test_spec for c in columns],
    count=-(-len(source) // batch_size),
    threads=threads,
  )


def each_batches(
  column: Column,
  values: Sequence,
  index: Sequence[int],
  *,
  batch_size: int,
  rows: tuple[int, int] | None = None,
) -> Iterator[Batch]:
  """Given values of one column once, for evaluation.

  Returns:
    An iterator over dicts of the column's keys and `index` int32 [b], the record that
    the value belongs to; -1 in rows that fill up the last batch.
  """
  first, stop = _rows(rows, batch_size)
  for start in range(0, len(values), batch_size):
    mine = slice(start + first, min(start + stop, start + batch_size))
    items = [column.test(value) for value in values[mine]]
    made = np.asarray(index[mine], np.int32)
    there = np.arange(len(items))
    yield _filled(
      stop - first,
      there,
      made,
      [(column, column.test_spec, there, column.rows(items) if items else {})],
    )


def record_batches(
  source: Source,
  columns: Sequence[Column],
  others: Sequence[Column],
  records: Sequence[Sequence[int]],
  *,
  batch_size: int,
  threads: int | None = None,
) -> Iterator[tuple[Batch, list]]:
  """Given records, each in its own row, and what people read of them.

  Args:
    source: what to read.
    columns: to make rows of. others: to describe alone.
    records: of each batch, at most `batch_size`; they may be any of the source's.
    batch_size: rows of the batches.
    threads: that make what is read; None: one a processor.

  Returns:
    An iterator with `close()`, over pairs: a batch as in `eval_batches`, and a list of
    the records as `describe` gives them. A corrupt record is the exception in this
    list, and its row, as those that fill up the batch, is empty. What `others` lack
    does not matter.
  """
  chunks = -(-batch_size // _CHUNK)
  everything = list({c.name: c for c in (*columns, *others)}.values())
  names = [c.name for c in everything]

  def chunk(element):
    number, part = divmod(element, chunks)
    mine = list(records[number][part * _CHUNK : (part + 1) * _CHUNK])
    found = source.read(mine, names) if mine else []
    good, items = [], []
    for row, record in enumerate(found):
      try:
        items.append([(c, c.test(value)) for c, value in _each(columns, record)])
        found[row] = describe(record, everything)
        good.append(row)
      except MissingLibrary:
        raise
      except Exception as error:
        found[row] = error
    made = _made(columns, [c.test_spec for c in columns], items)
    index = np.asarray(mine, np.int32)[good]
    rows = min(_CHUNK, batch_size - part * _CHUNK)
    return _filled(rows, np.array(good, int), index, made), found

  for parts in _threaded(chunk, chunks, len(records), threads or os.cpu_count()):
    found = [record for _, records in parts for record in records]
    yield _joined([batch for batch, _ in parts]), found


def describe(record: dict, columns: Sequence[Column]) -> dict:
  """What people read of a record: "id", "path" where it is a file, and by column."""
  said = {"id": record[KEY]} | ({"path": record[PATH]} if PATH in record else {})
  told = [c for c in columns if c.describe and c.name in record]
  return said | {c.name: c.describe(record[c.name]) for c in told}


def _rows(rows, batch_size):
  first, stop = (0, batch_size) if rows is None else rows
  if not 0 <= first < stop <= batch_size:
    raise UserError(f"rows {rows} do not lie in a batch of {batch_size}")
  return first, stop


def _gather(source, columns, held, seed, batch_size, step, first, stop):
  """Batches of a source in memory: one look-up for many batches, one gather each."""
  together = max(1, _LOOKAHEAD // (stop - first))
  while True:
    steps = np.arange(step, step + together, dtype=np.int64)
    positions = steps[:, None] * batch_size + np.arange(first, stop)
    for where, records in zip(positions, source.at(seed, positions)):
      batch = {"index": held.index.take(records)}
      for column in columns:
        batch |= column.gather(held.arrays[column.name], records, seed, where)
        if column.valid:
          batch[f"{column.name}_valid"] = held.valid[column.name].take(records)
      yield batch
    step += together


def _stream(
  positions: Callable,
  make: Callable,
  columns: Sequence[Column],
  specs: Sequence[dict],
  *,
  count: int | None = None,
  threads: int | None,
):
  """Batches that are made by Grain's threads, a chunk of rows at a time.

  Args:
    positions: number of the batch -> positions [b]; -1 is an empty row.
    make: positions -> (which of them have a record, the records, what `_filled` takes).
    count: number of batches; None: no end.
  """
  threads = threads or os.cpu_count()
  chunks = -(-len(positions(0)) // _CHUNK)

  def chunk(element):
    number, part = divmod(element, chunks)
    where = positions(number)[part * _CHUNK : (part + 1) * _CHUNK]
    rows = np.flatnonzero(where >= 0)
    good, records, made = make(where[rows], specs)
    return _filled(len(where), rows[good], records, made)

  for parts in _threaded(chunk, chunks, count, threads):
    yield _joined(parts)


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


def _joined(parts):
  return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _filled(count, rows, index, made):
  """A batch of `count` rows of which `rows` have records, `index` of them.

  made: (column, spec, which of `rows` have it, {key: rows}) of each column.
  """
  batch = {"index": np.full(count, -1, np.int32)}
  batch["index"][rows] = index
  for column, spec, there, arrays in made:
    if len(there) == count:
      batch |= arrays
    else:
      for key, like in spec.items():
        empty = column.fill.get(key, 0)
        batch[key] = np.full((count, *like.shape), empty, like.dtype)
        if len(there):
          batch[key][rows[there]] = arrays[key]
    if column.valid:
      batch[f"{column.name}_valid"] = np.zeros(count, bool)
      batch[f"{column.name}_valid"][rows[there]] = True
  return batch


def _made(columns, specs, items):
  """What `_filled` takes, of [(column, item), ...] of each row."""
  found = {c.name: ([], []) for c in columns}
  for row, each in enumerate(items):
    for column, item in each:
      found[column.name][0].append(row)
      found[column.name][1].append(item)
  made = []
  for column, spec in zip(columns, specs):
    there, mine = found[column.name]
    made.append((column, spec, np.array(there, int), column.rows(mine) if mine else {}))
  return made


def _holder(columns, held):
  """Makes rows of a source in memory, for evaluation."""

  def make(indices, specs):
    # What stands in for a corrupt record has an index of its own.
    good = np.flatnonzero(held.index[indices] == indices)
    records, made = indices[good], []
    for column, spec in zip(columns, specs):
      there = np.flatnonzero(held.valid[column.name][records])
      arrays = held.arrays[column.name]
      mine = column.gather(arrays, records[there], None, None) if len(there) else {}
      made.append((column, spec, there, mine))
    return good, records, made

  return make


def _reader(source, columns, seed=None):
  """Makes rows of a source that is read as it goes.

  In training (with a seed) the next good record stands in for a corrupt one; in
  evaluation its row is empty.
  """
  names = [c.name for c in columns]

  def items(index, record, position):
    """[(column, item)] of a record; None, and counted, if it is corrupt."""
    try:
      if seed is None:
        return [(c, c.test(value)) for c, value in _each(columns, record)]
      return [
        (c, c.train(value, seed, position)) for c, value in _each(columns, record)
      ]
    except MissingLibrary:
      raise
    except Exception as error:
      source.report_bad(index, error)
    return None

  def make(positions, specs):
    records = positions if seed is None else source.at(seed, positions)
    good, indices, found = [], [], []
    read = source.read(records.tolist(), names) if len(records) else []
    for row, (index, position) in enumerate(zip(records.tolist(), positions.tolist())):
      made, read[row] = items(index, read[row], position), None
      while made is None and seed is not None:
        index = (index + 1) % len(source)
        made = items(index, source.read([index], names)[0], position)
      if made is not None:
        good.append(row)
        indices.append(index)
        found.append(made)
    index = np.array(indices, np.int32)
    return np.array(good, int), index, _made(columns, specs, found)

  return make
