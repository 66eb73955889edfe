"""The model at work: evaluations ask it for embeddings, and it remembers them.

What `Method.embed` makes of a batch is chosen by name, in the jit, so that nothing else
leaves it. Parameters lie as they are given, split or not, and are gathered as in the
train step: a model that fits only when it is split is evaluated split.
"""

import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clj import augment as augmentation
from clj import sharding
from clj.cli import UserError
from clj.evals.rows import fetch

AT_LEAST = 512  # rows that are embedded at a time: small batches waste the devices
STRINGS = 256  # that are embedded at a time


class Stopped(Exception):
  """An evaluation was asked to stop on the way; it starts again after the restart."""


def never() -> bool:
  return False


class Embedder(NamedTuple):
  """A method with its weights, on one data set, in the mesh of the context.

  `split` is "train", "test" or another of the data set, or a `Split` that is open.
  `outputs` are names of what the method's `embed` makes. `rename` says which column of
  the data set stands for which that the method knows: {"first": "query"}.

  rows: `(split, outputs, rename={}, each=None) -> arrays [N', ...]` by name, split over
    the devices, with "label" and "index" `[N']`: -1 in rows that only fill up the last
    batch. The order of the rows is not that of the records; "index" has it. With the
    name of a column as `each`, every one of a record's several texts in it has a row,
    and "place" `[N']` is its number among `Split.texts`. What is asked for again is
    there.
  stream: `(split, outputs, rename={}) -> iterator` of the same, a batch at a time in
    the order of the records; nothing is kept.
  texts: `(strings, outputs) -> arrays [n, ...]` by name, NumPy, on every host; by the
    columns of the run, whose tokenizers it was trained with.
  source: `split -> Split`.
  columns: `(output, rename={}, of_run=False) -> {name: Column}`, what it is made of, in
    the data set of the run in the place of this one. Raises UserError where the method
    makes no such output of it.
  views: `(split, outputs, count) -> list`, an entry a view: arrays `[M, ...]` by name,
    of the first M <= `count` rows, augmented as in training. Empty where training makes
    no two views of what the outputs are made of.
  raw: `(split, describe, column) -> arrays [N', ...]`, as `rows`: what the function
    `describe` makes of a column's array, pictures in [0, 1], under its name; for
    baselines. `describe` is the key to what is there, hence no lambda.
  expect: `(split, outputs, rename={}, each=None)` will be asked of `rows`, so that one
    pass makes everything.
  """

  rows: Callable
  stream: Callable
  texts: Callable
  source: Callable
  columns: Callable
  views: Callable
  raw: Callable
  expect: Callable


class Programs(NamedTuple):
  """A method's `embed` and its augmentation, compiled once for all weights.

  embed: `(params, extra, batch, outputs) -> rows` by name, jitted.
  shapes: `(params, extra, batch) -> ShapeDtypeStructs` by name.
  augment: `batch -> batch`, views as in training, jitted; or None.
  """

  embed: Callable
  shapes: Callable
  augment: Callable | None


def is_lack(error: KeyError, columns: dict, augment: dict) -> bool:
  """Whether a method took a column for granted that was not given: no slip in it.

  columns, augment: of the run, whose keys a batch may have.
  """
  keys = [key for c in columns.values() for key in (*c.spec, *c.test_spec)]
  return any(error.args[0] == key for key in (*keys, *augment))


def programs(embed: Callable, augment: Callable | None = None) -> Programs:
  """embed: of a method. augment: of its training, `(rng, batch) -> batch`."""

  def run(params, extra, batch):
    batch = augmentation.to_float(batch)
    return embed(sharding.whole(params), sharding.whole(extra), batch)

  def shapes(params, extra, batch):
    struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.eval_shape(run, *jax.tree.map(struct, (params, extra, batch)))

  @functools.partial(jax.jit, static_argnums=3)
  def chosen(params, extra, batch, outputs):
    found = run(params, extra, batch)
    return {name: _by_device(found[name]) for name in outputs}

  def views(batch):
    """What evaluation shows as a record's only view goes in whole."""
    only = lambda x: x[:, 0] if x.ndim == 5 and x.shape[1] == 1 else x
    made = augment(jax.random.key(0), {key: only(x) for key, x in batch.items()})
    return {key: made[key] for key in batch}

  return Programs(chosen, shapes, jax.jit(views) if augment else None)


class Asked(NamedTuple):
  """What rows are made of: a pass over a split."""

  split: int  # id of the open `Split`, which the `Data` keeps
  rename: tuple
  each: str | None


class Memory(NamedTuple):
  """What embedders of the same weights share, of several data sets."""

  rows: dict  # Asked -> {name: array}
  expected: dict  # Asked -> names of outputs


def memory() -> Memory:
  return Memory({}, {})


def make_embedder(
  compiled: Programs,
  params,
  extra,
  data,
  *,
  batch_size: int,
  run=None,
  known: Memory | None = None,
  stopping=never,
) -> Embedder:
  """The model at work on a data set.

  params, extra: arrays, or their shapes where only `columns` is asked.
  data: a `clj.data.Data`. batch_size: of the training; at least 512 rows are embedded
  at a time. run: the `Data` of the run, where `data` is another.
  known: what was embedded before, by the same weights.
  stopping: asked before each batch; Stopped is raised where it is true.
  """
  known, run = known or memory(), run or data
  batches = _Batches(data, batch_size, stopping)
  model = _Model(compiled, params, extra, data, run, known, batches)
  return Embedder(
    model.rows,
    model.stream,
    model.texts,
    model.source,
    model.columns,
    model.views,
    model.raw,
    model.expect,
  )


class _Model:
  """What an `Embedder` is made of."""

  def __init__(self, compiled, params, extra, data, run, known, batches):
    self._compiled, self._params, self._extra = compiled, params, extra
    self._data, self._run, self._known, self._batches = data, run, known, batches
    self._made = {}  # columns, rename, of which data -> outputs

  def source(self, split):
    if not isinstance(split, str):
      return split
    named = split in ("train", "test")
    return getattr(self._data, split) if named else self._data.split(split)

  def _made_of(self, names, rename, where):
    """The outputs of a set of columns; none where the method looks for others."""
    key = (names, rename, where is self._run)
    if key not in self._made:
      batch = self._batches.shapes(names, dict(rename), where.columns)
      try:
        found = self._compiled.shapes(self._params, self._extra, batch)
        self._made[key] = tuple(found)
      except KeyError as error:
        if not is_lack(error, self._run.columns, self._run.section["augment"]):
          raise
        self._made[key] = ()
    return self._made[key]

  def columns(self, output, rename=None, of_run=False):
    where = self._run if of_run else self._data
    rename = tuple(sorted((rename or {}).items()))
    there = _in_use(where.columns, dict(rename))
    sets = [(name,) for name in there]
    sets += [there] * (len(there) > 1)  # before the others, of which there are many
    makes = lambda names: self._made_of(names, rename, where)
    found = next((names for names in sets if output in makes(names)), None)
    if found is None:
      every = sorted({name for names in sets for name in makes(names)})
      raise UserError(
        f"there is no {output!r} among what the model makes of {where.name!r} (columns "
        f"{', '.join(there)}), which is {', '.join(every) or 'nothing'}"
      )
    for size in range(2, len(found)):
      for names in itertools.combinations(found, size):
        if output in makes(names):
          return {name: where.columns[name] for name in names}
    return {name: where.columns[name] for name in found}

  def _by_columns(self, outputs, rename=None, of_run=False):
    """{names of columns: the outputs that are made of them}."""
    groups = {}
    for output in sorted(outputs):
      made = tuple(self.columns(output, rename, of_run))
      groups.setdefault(made, []).append(output)
    return groups

  def _embed(self, batch, outputs):
    return self._compiled.embed(self._params, self._extra, batch, tuple(outputs))

  def _passing(self, split, names, outputs, rename, each=None):
    for batch, about in self._batches(self.source(split), names, rename, each):
      yield self._embed(batch, outputs) | about

  def _asked(self, split, rename=None, each=None):
    return Asked(id(self.source(split)), tuple(sorted((rename or {}).items())), each)

  def expect(self, split, outputs, rename=None, each=None):
    key = self._asked(split, rename, each)
    self._known.expected.setdefault(key, set()).update(outputs)

  def rows(self, split, outputs, rename=None, each=None):
    key = self._asked(split, rename, each)
    have = self._known.rows.setdefault(key, {})
    wanted = {*outputs, *self._known.expected.get(key, ())} - set(have)
    for names, group in self._by_columns(wanted, rename).items():
      if not set(group) & set(outputs):
        continue  # of another pass, which may never be needed
      found = self._passing(split, names, group, rename, each)
      have |= _collect(found, self._batches.count(self.source(split), each))
    beside = ("label", "index", "place") if each else ("label", "index")
    return {name: have[name] for name in (*outputs, *beside)}

  def stream(self, split, outputs, rename=None):
    streams = [
      self._passing(split, names, group, rename)
      for names, group in self._by_columns(outputs, rename).items()
    ]
    for parts in zip(*streams, strict=True):
      yield {name: x for part in parts for name, x in part.items()}

  def raw(self, split, describe, column):
    have = self._known.rows.setdefault(self._asked(split), {})
    key, source = (describe, column), self.source(split)
    if key not in have:
      found = (
        {"made": _described(describe, batch[column])} | about
        for batch, about in self._batches(source, (column,), None)
      )
      found = _collect(found, self._batches.count(source))
      have |= {key: found.pop("made")} | found
    about = {name: have[name] for name in ("label", "index")}
    return {describe.__name__: have[key]} | about

  def texts(self, strings, outputs):
    parts = []
    for (name,), group in self._by_columns(outputs, of_run=True).items():
      for batch in self._batches.of_strings(strings, self._run.columns[name]):
        parts.append({o: fetch(z) for o, z in self._embed(batch, group).items()})
    gather = lambda name: np.concatenate([p[name] for p in parts if name in p])
    return {name: gather(name)[: len(strings)] for name in outputs}

  def views(self, split, outputs, count):
    if self._compiled.augment is None:
      return []
    source = self.source(split)
    taken = self._batches(source, self._batches.there(source), None, rows=count)
    with contextlib.closing(taken):
      batch, about = next(taken)
    made = self._compiled.augment(batch)
    used = {n: self._data.columns[n] for o in outputs for n in self.columns(o)}
    used = self._batches.shapes(used, {}, used)
    grew = lambda x, old: x.ndim == old.ndim > 2 and x.shape[1] > old.shape[1] == 1
    several = [key for key in used if grew(made[key], batch[key])]
    filled = min(len(about["index"]), count, len(source))
    found = []
    for v in range(min((made[key].shape[1] for key in several), default=0)):
      seen = {k: made[k][:, v : v + 1] if k in several else batch[k] for k in used}
      z = self._embed(seen, sorted(outputs))
      found.append({output: z[output][:filled] for output in outputs})
    return found


class _Batches:
  """Batches of evaluation on the devices, with what is kept of each beside it."""

  def __init__(self, data, batch_size: int, stopping):
    self._data, self._stopping = data, stopping
    self._mesh = jax.sharding.get_mesh()
    self._size = self._whole(max(batch_size, AT_LEAST))
    everywhere = sharding.replicated(self._mesh)
    self._constants = {
      key: jax.device_put(x, everywhere) for key, x in data.constants.items()
    }

  def _whole(self, rows):
    return -(-rows // self._mesh.size) * self._mesh.size

  def count(self, split, each=None) -> int:
    rows = len(split.texts(each)[0]) if each else len(split)
    return -(-rows // self._size)

  def shapes(self, names, rename, columns):
    """A batch as `__call__` gives it, without its values."""
    found = {}
    for name in names:
      for key, row in columns[name].test_spec.items():
        key = _renamed(key, name, rename)
        found[key] = jax.ShapeDtypeStruct((self._mesh.size, *row.shape), row.dtype)
    return found | self._constants

  def __call__(self, split, names, rename, each=None, rows=None):
    """Yields (batch for `embed`, {"label", "index"})."""
    size = self._size if rows is None else self._whole(rows)
    mine = sharding.process_rows(size, self._mesh)
    keys = names if each else (*names, "label")
    stream = split.batches(batch_size=size, rows=mine, keys=keys, each=each)
    with contextlib.closing(stream):
      for number, batch in enumerate(stream):
        if self._stopping():
          raise Stopped
        none = np.full(len(batch["index"]), -1, np.int32)
        there = [batch[f"{n}_valid"] for n in names if f"{n}_valid" in batch]
        there = np.all([batch["index"] >= 0, *there], axis=0)  # with all that is used
        label = batch.get("label", none)
        about = {"index": np.where(there, batch["index"], none)}
        about["label"] = np.where(there, label, none)
        if each:
          about["place"] = np.arange(*mine, dtype=np.int32) + number * size
        batch = {
          _renamed(key, name, rename or {}): batch[key]
          for name in names
          for key in self._data.columns[name].test_spec
        }
        batch, about = (sharding.to_global(x, self._mesh) for x in (batch, about))
        yield batch | self._constants, about

  def there(self, split) -> tuple[str, ...]:
    """The columns that a split has."""
    return tuple(name for name in self._data.columns if name in split.source.gives)

  def of_strings(self, strings, column):
    """Yields batches for `embed`; the last string fills up the last."""
    size = self._whole(STRINGS)
    first, stop = sharding.process_rows(size, self._mesh)
    made = column.rows([column.test(string) for string in strings])
    for start in range(0, len(strings), size):
      if self._stopping():
        raise Stopped
      mine = np.minimum(np.arange(start + first, start + stop), len(strings) - 1)
      batch = {key: x[mine] for key, x in made.items()}
      yield sharding.to_global(batch, self._mesh) | self._constants


def _in_use(columns, rename: dict) -> tuple[str, ...]:
  """Columns that go where the method looks, none in the place of a renamed one."""
  if unknown := [name for name in rename if name not in columns]:
    raise UserError(f"rename has {unknown[0]!r}; there are: {', '.join(columns)}")
  return tuple(c for c in columns if c in rename or c not in rename.values())


def _renamed(key: str, column: str, rename: dict) -> str:
  """A key of a column, such as "first_mask", under the name of another one."""
  return rename.get(column, column) + key.removeprefix(column)


def _by_device(x):
  """Rows over all devices, wherever the compiler would have them."""
  spec = jax.sharding.PartitionSpec(sharding.AXES)
  return jax.lax.with_sharding_constraint(x, spec)


@functools.partial(jax.jit, static_argnums=0)
def _described(describe, x):
  return _by_device(describe(augmentation.to_float({"": x})[""]))


def _collect(batches, count: int) -> dict:
  """`count` batches `[B, ...]` -> `[B * count, ...]`; rows stay where they were made.

  Each is written into its place: what is compiled does not grow with their number.
  """
  rows, running = {}, deque()
  for i, batch in zip(range(count), batches, strict=True):
    rows = rows or {key: _room(x, count) for key, x in batch.items()}
    rows = {key: _put(rows[key], x, i) for key, x in batch.items()}
    running.append(batch)
    if len(running) > 2:  # the host shall not run far ahead of the devices
      jax.block_until_ready(running.popleft())
  return {key: _flat(x) for key, x in rows.items()}


def _room(x, count):
  return _zeros(x.shape[:1] + (count,) + x.shape[1:], x.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(shape, dtype):
  return _by_device(jnp.zeros(shape, dtype))


@functools.partial(jax.jit, donate_argnums=0)
def _put(rows, x, i):
  return _by_device(jax.lax.dynamic_update_slice_in_dim(rows, x[:, None], i, axis=1))


@functools.partial(jax.jit, donate_argnums=0)
def _flat(rows):
  return _by_device(rows.reshape(-1, *rows.shape[2:]))
