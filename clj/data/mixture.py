"""Sources with another order: mixtures, batches balanced by class, a share by class.

Each is a `Source` again, whose `at` costs O(1) a position and keeps nothing of the size
of the stream.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from clj.data.order import mix, order
from clj.data.source import DataError, Source

_SLOTS = 4096  # of a mixture: weights are kept to that precision


def mixture(
  sources: Sequence[Source], weights: Sequence[float] | None = None
) -> Source:
  """Several sources as one, each with its share of every stretch of the stream.

  A table of slots says which source a position takes, spread evenly; within a source
  every record comes once an epoch, in an order of its own. Records are numbered through
  the sources. What one source gives and another does not is absent from the records of
  the latter.

  Args:
    weights: of each source, above 0; None: all the same.

  Raises:
    DataError: a weight is not above 0, or there are more sources than slots.
  """
  weights = np.ones(len(sources)) if weights is None else np.asarray(weights, float)
  if len(weights) != len(sources) or not (weights > 0).all():
    raise DataError(
      f"data.mixture: the weights {weights.tolist()} of {len(sources)} sources must all"
      " be above 0"
    )
  table, rank = _slots(weights)
  counts = np.bincount(table, minlength=len(sources))
  first = np.cumsum([0, *map(len, sources)])

  def ordering(seed, positions):
    block, slot = np.divmod(positions, len(table))
    which, records = table[slot], np.empty(positions.shape, np.int64)
    for k, source in enumerate(sources):
      mine = which == k
      place = block[mine] * counts[k] + rank[slot[mine]]
      records[mine] = first[k] + source.at(_seed(seed, k), place)
    return records

  def reader(indices, columns):
    indices = np.asarray(indices, np.int64)
    owner, records = (
      np.searchsorted(first, indices, side="right") - 1,
      [None] * len(indices),
    )
    for k in np.unique(owner):
      mine = np.flatnonzero(owner == k)
      found = sources[k].read((indices[mine] - first[k]).tolist(), columns)
      for row, record in zip(mine, found):
        records[row] = _named(record, sources[k].class_names)
    return records

  gives = tuple(dict.fromkeys(c for s in sources for c in s.gives))
  return Source(
    " + ".join(s.name for s in sources),
    int(first[-1]),
    gives,
    reader,
    class_names=_all_names(sources, gives),
    shapes={
      c: sources[0].shapes[c]
      for c in sources[0].shapes
      if all(s.shapes.get(c) == sources[0].shapes[c] for s in sources)
    },
    constants={k: v for s in sources for k, v in s.constants.items()},
    ordering=ordering,
  )


def _slots(weights):
  """Which source each slot takes, and how many slots before it took the same.

  As many slots each as its share says, at least one; the j-th of n stands at (j + 1/2)
  / n of the table.
  """
  share = weights / weights.sum()
  size = next(
    (
      n for n in range(len(share), _SLOTS) if np.allclose(share * n, np.rint(share * n))
    ),
    _SLOTS,
  )
  counts = np.maximum(np.floor(share * size + 1e-9), 1).astype(int)
  if (missing := size - counts.sum()) < 0:
    counts[counts.argmax()] += missing
  else:
    largest = np.argsort(-(share * size - counts), kind="stable")
    counts[largest[:missing]] += 1
  if (counts < 1).any():
    raise DataError(f"data.mixture: {len(weights)} sources do not fit {size} slots")
  place = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
  owner = np.repeat(np.arange(len(counts)), counts)
  rank = np.concatenate([np.arange(n) for n in counts])
  by_place = np.argsort(place, kind="stable")
  return owner[by_place], rank[by_place]


def _seed(seed, k):
  return int(mix(seed, k, -4))


def _named(record, class_names):
  """A record with names for numbers of classes: each source has its own numbers."""
  if isinstance(record, Exception) or not class_names:
    return record
  named = {}
  for column, names in class_names.items():
    if column in record and not isinstance(record[column], str | bytes | None):
      number = int(record[column])
      named[column] = names[number] if 0 <= number < len(names) else None
  return record | named


def _all_names(sources, gives):
  """The classes of all sources, where all of them name theirs."""
  found = {}
  for column in gives:
    names = [s.class_names.get(column) for s in sources if column in s.gives]
    if all(each is not None for each in names):
      found[column] = tuple(dict.fromkeys(name for each in names for name in each))
  return found


def balanced(source: Source, classes: np.ndarray, each: int) -> Source:
  """The same records in groups of `each` of one class, every class as often.

  The classes come in a new order each time round, so that the groups of a batch are of
  different ones (but where the batch spans two rounds), and the records of a class in
  `order`; a class with fewer than `each` repeats them.

  classes: number of each record, int [N]; records below 0 are left out.
  """
  by_class = np.argsort(classes, kind="stable")
  by_class = by_class[np.asarray(classes)[by_class] >= 0]
  kinds, first = np.unique(np.asarray(classes)[by_class], return_index=True)
  if not len(kinds):
    raise DataError(f"{source.name} has no labels: data.balanced needs them")
  stops = np.append(first[1:], len(by_class))

  def ordering(seed, positions):
    group, place = np.divmod(positions, each)
    which = order(_seed(seed, -1), group, len(kinds))
    place = group // len(kinds) * each + place
    records = np.empty(positions.shape, np.int64)
    for k in np.unique(which):
      mine = which == k
      member = order(_seed(seed, int(kinds[k])), place[mine], int(stops[k] - first[k]))
      records[mine] = by_class[first[k] + member]
    return records

  return dataclasses.replace(source, ordering=ordering)


def subset(
  source: Source, classes: np.ndarray | None, share: float, seed: int = 0
) -> Source:
  """A share of the records, the same of every class, chosen by a seed.

  At least one of each class. The records keep their order; `index` counts the chosen.

  classes: number of each record, int [N]; None: there are none.
  """
  if not 0 < share <= 1:
    raise DataError(f"data.subset is {share}; it is a share, above 0 and at most 1")
  classes = np.zeros(len(source), int) if classes is None else np.asarray(classes)
  chosen = []
  for kind in np.unique(classes):
    members = np.flatnonzero(classes == kind)
    count = max(1, round(share * len(members)))
    picked = order(_seed(seed, int(kind)), np.arange(count), len(members))
    chosen.append(members[picked])
  return select(source, np.sort(np.concatenate(chosen)), f"{source.name} ({share:g})")


def select(source: Source, records: np.ndarray, name: str) -> Source:
  """The given records of a source, in their order."""
  arrays, files = source.arrays, source.files
  if arrays is not None:
    arrays = {
      key: each[records] if isinstance(each, np.ndarray) else [each[i] for i in records]
      for key, each in arrays.items()
    }
  return Source(
    name,
    len(records),
    source.gives,
    lambda indices, columns: source.read(
      records[np.asarray(indices)].tolist(), columns
    ),
    arrays,
    source.class_names,
    source.shapes,
    tuple(files[i] for i in records) if files else None,
    source.constants,
  )
