"""The door: what the section `data` of a config opens.

data = open_data(config["data"], workdir=workdir)
for batch in data.batches(seed=0, batch_size=256): ...
for batch in data.test.batches(batch_size=256): ...
"""

import difflib
import functools
import inspect
import itertools
import json
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from clj.cli import UserError, check_keywords
from clj.data import mixture, pipeline, text
from clj.data.columns import (
  COLUMNS,
  OF_SOURCE,
  About,
  Column,
  Shape,
  UnknownShape,
  picture,
  strings,
)
from clj.data.source import DataError, Source, Want
from clj.data.sources import MEMORY_LIMIT, open_source

_SAMPLE = 100_000  # records that a vocabulary is learned from
_DEFAULT = {"image": {"kind": "image"}, "label": {"kind": "label"}}


def _section(
  *,
  source: str = "",
  train_split: str = "train",
  test_split: str = "test",
  data_dir: str = "",
  threads: int = 0,
  columns: dict | None = None,
  augment: dict | None = None,
  mixture: Sequence[dict] | None = None,
  balanced: dict | None = None,
  subset: float = 1.0,
  subset_seed: int = 0,
) -> dict:
  """The section `data`, with what it leaves out."""
  return {
    "source": source or next((part.get("source", "") for part in mixture or ()), ""),
    "train_split": train_split,
    "test_split": test_split,
    "data_dir": data_dir,
    "threads": threads,
    "columns": {k: v for k, v in (columns or _DEFAULT).items() if v is not None},
    "augment": augment or {},
    "mixture": tuple(mixture or ()),
    "balanced": balanced or {},
    "subset": subset,
    "subset_seed": subset_seed,
  }


def _checked(section: dict) -> dict:
  check_keywords(_section, section, "data")
  section = _section(**section)
  for name, options in section["columns"].items():
    _kind(name, options)
    if name in ("index", "id", "path") or not name.isidentifier():
      raise UserError(f"data.columns.{name}: a column cannot be called so")
  for number, part in enumerate(section["mixture"]):
    where = f"data.mixture[{number}]"
    check_keywords(_part, part, where)
    for name in part.get("columns") or {}:
      if name not in section["columns"]:
        raise UserError(f"{where} is of a column {name!r} that data.columns lacks")
  check_keywords(_balanced, section["balanced"], "data.balanced")
  return section


def _kind(name, options):
  """The function of a column's kind, and its options; refuses what is unknown."""
  kind = options.get("kind", name)
  if kind not in COLUMNS:
    near = difflib.get_close_matches(str(kind), COLUMNS, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(COLUMNS)}"
    raise UserError(f"data.columns.{name}.kind is {kind!r}; {hint}")
  options = {k: v for k, v in options.items() if k != "kind"}
  check_keywords(COLUMNS[kind], options, f"data.columns.{name}")
  return kind, options


def _want(name, options, lenient=False) -> Want:
  kind = options.get("kind", name)
  field = options.get("field") or name
  optional = lenient or (name, kind) == ("label", "label") and "field" not in options
  return Want(field, kind, optional, f"data.columns.{name}.field")


class Split:
  """One split of a data set, made by `Data`.

  Attributes:
    source: its records. name: of the source, with the split. columns: by name.
    classes: names of the classes, by column; None where it has none.
    keys: of its evaluation batches.
  """

  def __init__(
    self, source: Source, columns: dict[str, Column], threads: int, limit: int
  ):
    self.source, self.columns, self.name = source, columns, source.name
    self._threads, self._limit, self._texts = threads or None, limit, {}
    self.classes = {name: column.class_names for name, column in columns.items()}
    self.keys = ("index", *(key for c in columns.values() for key in _keys(c, True)))

  def __len__(self):
    return len(self.source)

  @property
  def bad(self) -> dict[int, str]:
    """The corrupt records met so far, index -> reason."""
    return self.source.bad

  @functools.cached_property
  def is_held(self) -> bool:
    """Whether the split is held in memory: all columns can be, and there is room.

    Raises:
      DataError: the config asks for it, and it cannot be.
    """
    sizes = {name: column.held_bytes for name, column in self.columns.items()}
    asked = [column.held_key for column in self.columns.values() if column.held_key]
    if streamed := [name for name, size in sizes.items() if size is None]:
      if not asked:
        return False
      raise DataError(
        f"{asked[0]} holds {self.name} in memory, but data.columns.{streamed[0]} is"
        " streamed: hold it too, or set this one to 0 to stream both"
      )
    if (needed := len(self) * sum(sizes.values())) > self._limit:
      if not asked:
        return False
      raise DataError(
        f"{self.name} with {asked[0]} takes {needed / 2**30:.1f} GiB of"
        f" {self._limit / 2**30:.1f}: lower it, or set it to 0 to stream"
      )
    return True

  @functools.cached_property
  def held(self) -> pipeline.Held | None:
    """The split in memory, decoded at the first look; None: it is streamed."""
    if not self.is_held:
      return None
    return pipeline.load(self.source, list(self.columns.values()))

  def _chosen(self, keys):
    """The columns that give some of these keys; None: all."""
    if keys is None:
      return list(self.columns.values())
    wanted = set(keys)
    return [
      column
      for name, column in self.columns.items()
      if name in wanted or wanted & set(_keys(column, True))
    ]

  def batches(
    self,
    *,
    batch_size: int,
    rows: tuple[int, int] | None = None,
    keys: Sequence[str] | None = None,
    each: str | None = None,
  ) -> Iterator[dict]:
    """Every record once, in its order, for evaluation; `index` -1 in filler rows.

    Args:
      batch_size: rows of the global batch.
      rows: first row and end of the rows of each batch to give; None: all.
      keys: that are needed: other columns are not made; None: all.
      each: a column of texts, all of which come, each in a row of its own.

    Returns:
      An iterator with `close()` over dicts of the columns' `test_spec` and `index`.
    """
    if each is not None:
      said, index = self.texts(each)
      return pipeline.each_batches(
        self.columns[each], said, index, batch_size=batch_size, rows=rows
      )
    return pipeline.eval_batches(
      self.source,
      self._chosen(keys),
      self.held,
      batch_size=batch_size,
      rows=rows,
      threads=self._threads,
    )

  def records(self, indices: Sequence[int]) -> list:
    """What people read of records: "id", "path" of a file, texts, class numbers.

    What cannot be read comes as the exception.
    """
    columns = [column for column in self.columns.values() if column.describe]
    found = self.source.read([int(i) for i in indices], [c.name for c in columns])
    return [
      record if isinstance(record, Exception) else pipeline.describe(record, columns)
      for record in found
    ]

  def picture(self, index: int, column: str = "image") -> np.ndarray:
    """The picture of a record as it was stored, uint8 [H, W, 3]."""
    (record,) = self.source.read([int(index)], [column])
    if isinstance(record, Exception):
      raise record
    if column not in record:
      raise DataError(f"{self.name} has no column {column!r}")
    return picture(record[column])

  def texts(self, column: str) -> tuple[list[str], np.ndarray]:
    """Every text of a column, and the record of each, int32 [M]."""
    if column not in self.source.gives:
      raise DataError(f"{self.name} has no column {column!r} of texts")
    if column not in self._texts:  # what is streamed is read for its texts once
      self._texts[column] = self._read_texts(column)
    return self._texts[column]

  def _read_texts(self, column):
    said, index = [], []
    bad = self.bad if self.held is not None else {}
    for i, value in self.source.values(column):
      if i not in bad:
        mine = strings(value)
        said += mine
        index += [i] * len(mine)
    return said, np.array(index, np.int32)

  def record_batches(
    self,
    records: Sequence[Sequence[int]],
    *,
    batch_size: int,
    keys: Sequence[str] | None = None,
  ) -> Iterator[tuple[dict, list]]:
    """Given records, each in its own row, and what people read of them.

    See `pipeline.record_batches`; keys: as in `batches`.
    """
    others = [column for column in self.columns.values() if column.describe]
    return pipeline.record_batches(
      self.source,
      self._chosen(keys),
      others,
      records,
      batch_size=batch_size,
      threads=self._threads,
    )

  def labels(self) -> np.ndarray | None:
    """The class of each record, int [N], -1: none; None: it has no such column."""
    return _labels(self.source, self.columns)


class Data:
  """A data set as a config describes it; see `open_data`.

  Attributes:
    name: of the source.
    columns: by name.
    saved: JSON-able; {column: what is kept of it in checkpoints and compared}.
    limits: {key: number that the values of this key stay below}.
  """

  def __init__(self, section, columns, source, limit):
    self.section, self.columns, self._limit = section, columns, limit
    self.name = section["source"] or getattr(source, "name", "")
    self._source = source
    self.saved = {name: c.saved for name, c in columns.items() if c.saved}
    self.limits = {k: v for c in columns.values() for k, v in c.limits.items()}
    self._splits, self._others = {}, {}

  @property
  def constants(self) -> dict[str, np.ndarray]:
    """Arrays that every step needs whole, by key."""
    return self._source.constants

  @functools.cached_property
  def spec(self) -> dict[str, Shape]:
    """Shape and dtype of a row of a training batch, by key."""
    return _spec(self.columns, self.train.is_held)

  @functools.cached_property
  def train(self) -> Split:
    section, source = self.section, self._source
    if section["subset"] != 1:
      classes = _labels(source, self.columns)
      source = mixture.subset(
        source, classes, section["subset"], section["subset_seed"]
      )
    if section["balanced"]:
      options = section["balanced"]
      source = _call(_balanced, "data.balanced", source, self.columns, **options)
    return Split(source, self.columns, section["threads"], self._limit)

  @functools.cached_property
  def test(self) -> Split:
    return self.split(self.section["test_split"])

  def split(self, name: str) -> Split:
    """Any split of the same source, opened once."""
    section = self.section
    plain = (
      not section["mixture"] and not section["balanced"] and section["subset"] == 1
    )
    if name == section["train_split"] and plain:
      return self.train
    if name not in self._splits:
      source = _open(self.section | {"mixture": ()}, name, self._limit)
      split = Split(source, self.columns, self.section["threads"], self._limit)
      self._splits[name] = split
    return self._splits[name]

  def other(self, section: dict) -> "Data":
    """Another data set for an evaluation, with this one's sizes and tokenizers.

    Where it is read, which fields, and what is held in memory are its own. What of the
    columns it does not have is left out, unless the section names it. A section without
    a source is of the same data set: another split of it.
    """
    key = json.dumps(section, sort_keys=True, default=str)
    same = "source" not in section
    if same:
      kept = ("source", "data_dir", "train_split", "test_split")
      section = {k: self.section[k] for k in kept} | section
    if key not in self._others:
      own = section.get("columns") or {}
      columns = {}
      for name, options in self.section["columns"].items():
        shared = {k: v for k, v in options.items() if same or k not in OF_SOURCE}
        shared["kind"] = options.get("kind", name)
        size = next(iter(self.columns[name].test_spec.values())).shape
        if shared["kind"] == "image":
          shared["size"] = size[1]
        columns[name] = shared | own.get(name, {})
      columns |= {name: o for name, o in own.items() if name not in columns}
      made = {name: c.tokenizer for name, c in self.columns.items() if c.tokenizer}
      whole = {"threads": self.section["threads"]} | section | {"columns": columns}
      whole["augment"] = self.section["augment"]
      self._others[key] = _opened(
        whole, made, self._limit, lenient=[c for c in columns if c not in own]
      )
    return self._others[key]

  def batches(
    self,
    *,
    seed: int,
    batch_size: int,
    step: int = 0,
    rows: tuple[int, int] | None = None,
  ) -> Iterator[dict]:
    """Training batches without end; an iterator with `close()`.

    See `pipeline.batches`.
    """
    train, balanced = self.train, self.section["balanced"]
    if balanced and batch_size != balanced["classes"] * balanced["each"]:
      raise UserError(
        f"data.balanced has {balanced['classes']} classes of {balanced['each']} each,"
        f" but batch_size is {batch_size}; set it to their product"
      )
    return pipeline.batches(
      train.source,
      list(self.columns.values()),
      train.held,
      seed=seed,
      batch_size=batch_size,
      step=step,
      rows=rows,
      threads=self.section["threads"] or None,
    )

  @functools.cached_property
  def _truncated(self) -> dict[str, float]:
    """The share of texts that are cut, by column: of a sample where it is streamed."""
    shares, held = {}, self.train.held
    for name, column in self.columns.items():
      if column.tokenizer and name in self.train.source.gives:
        if held is not None:
          shares[name] = held.arrays[name]["cut"]
          continue
        sample = [s for _, v in self._source.values(name, 2048) for s in strings(v)]
        shares[name] = column.tokenizer.encode(sample)[2] / max(1, len(sample))
    return shares

  @property
  def facts(self) -> str:
    """A line for each column of texts, for the start of a run."""
    lines = []
    for name, share in self._truncated.items():
      line = text.describe(self.columns[name].tokenizer, share)
      lines.append(line if name == "text" else f"{name}: {line}")
    return "\n".join(lines)

  @property
  def metrics(self) -> dict[str, float]:
    """Numbers that do not change in a run."""
    return {
      "data/truncated_captions" if name == "text" else f"data/truncated_{name}": share
      for name, share in self._truncated.items()
    }


def open_data(
  section: dict,
  *,
  workdir=None,
  started: bool = False,
  memory_limit: int = MEMORY_LIMIT,
  source: Source | None = None,
) -> Data:
  """Opens what the section `data` of a config describes; nothing is decoded yet.

  Args:
    section: of the config.
    workdir: where the tokenizers of the run are kept; None: nowhere.
    started: whether the run has begun: its tokenizers are taken from there then, else
      they are learned or opened, and process 0 saves them.
    memory_limit: bytes of a split that may be held in memory; 0: everything streams.
    source: the training split, where it is one's own; it gives the columns by name.

  Raises:
    UserError, DataError: one line that names the key of the config.
  """
  section = _checked(section)
  if source is None:
    source = _open(section, section["train_split"], memory_limit)
  tokenizers = _tokenizers(section["columns"], source, workdir, started)
  return _opened(section, tokenizers, memory_limit, source)


def expected_spec(section: dict) -> dict[str, Shape]:
  """`Data.spec` without asking the data, for planning where they are not.

  Pictures are taken to be streamed, but those with `memory_size` and embedded ones.
  Where there are arrays, whose shape only the data tell, the data are asked after all.

  Raises:
    UserError, DataError: as `open_data`.
  """
  section = _checked(section)
  source = None
  if section["source"].partition("/")[0] == "shapes":
    source = _open(section, section["train_split"], MEMORY_LIMIT)
  columns = {}
  for name, options in section["columns"].items():
    kind, options = _kind(name, options)
    if "length" not in options and "same_as" in options:
      options["length"] = section["columns"][options["same_as"]]["length"]
    about = About(name, source=source, crops=_crop_sets(section, name))
    try:
      columns[name] = _make(COLUMNS[kind], about, options)
    except UnknownShape:
      return open_data(section).spec
  is_held = all(column.held_bytes is not None for column in columns.values())
  return _spec(_with_valid(section, columns), is_held)


def data_of_run(section: dict, workdir, memory_limit: int = MEMORY_LIMIT) -> Data:
  """The data of a run by its workdir, not looked at where that can be done without.

  It is there for its columns, and to open `other` data like it: classes have no names.

  Raises:
    UserError, DataError: as `open_data`.
  """
  checked = _checked(section)
  tokenizers = _tokenizers(checked["columns"], None, workdir, True)
  columns = {}
  try:
    for name, options in checked["columns"].items():
      kind, options = _kind(name, options)
      tokenizer = tokenizers.get(name)
      if tokenizer is not None:
        options = {"length": tokenizer.length} | options
      about = About(name, crops=_crop_sets(checked, name), tokenizer=tokenizer)
      columns[name] = _make(COLUMNS[kind], about, options)
  except UserError:  # a shape that only the data tell
    return open_data(section, workdir=workdir, started=True, memory_limit=memory_limit)
  return Data(checked, columns, None, memory_limit)


def _spec(columns, is_held):
  spec = {"index": Shape((), np.int32)}
  for column in columns.values():
    spec |= (column.held_spec if is_held else None) or column.spec
    if column.valid:
      spec[f"{column.name}_valid"] = Shape((), np.bool_)
  return spec


def _keys(column, test=False):
  keys = tuple(column.test_spec if test else column.spec)
  return keys + ((f"{column.name}_valid",) if column.valid else ())


def _opened(section, tokenizers, limit, source=None, lenient=()) -> Data:
  section = _checked(section)
  if source is None:
    source = _open(section, section["train_split"], limit, lenient)
  missing = [n for n in lenient if n not in source.gives]
  section = section | {
    "columns": {n: o for n, o in section["columns"].items() if n not in missing}
  }
  columns, fields = {}, []
  for name, options in section["columns"].items():
    kind, options = _kind(name, options)
    field = options.get("field") or name
    tokenizer = tokenizers.get(name)
    if tokenizer is not None:
      options = {"length": tokenizer.length} | options
    about = About(
      name,
      field,
      source,
      _crop_sets(section, name),
      tokenizer,
      fields.count((kind, field)),
    )
    fields.append((kind, field))
    columns[name] = _make(COLUMNS[kind], about, options)
  return Data(section, _with_valid(section, columns), source, limit)


def _make(kind, about, options):
  return _call(kind, f"data.columns.{about.name}", about, **options)


def _call(function, where, *args, **options):
  """Calls it with options of a config, `check_keywords` having passed."""
  parameters = inspect.signature(function).parameters.values()
  needed = [
    p.name for p in parameters if p.kind == p.KEYWORD_ONLY and p.default is p.empty
  ]
  if missing := [name for name in needed if name not in options]:
    raise UserError(f"{where} needs {' and '.join(missing)}")
  return function(*args, **options)


def _with_valid(section, columns):
  """Marks what some source of a mixture lacks; that a label is not there, -1 says."""
  lacking = {
    name
    for part in section["mixture"]
    for name, options in (part.get("columns") or {}).items()
    if options is None and columns[name].fill.get(name) != -1
  }
  return {n: column._replace(valid=n in lacking) for n, column in columns.items()}


def _crop_sets(section, name):
  """What the host cuts of the pictures of a column."""
  from clj import augment  # here: it imports JAX

  return augment.host_crops(section["augment"], name)


def _open(section, split, limit, lenient=()) -> Source:
  """The source of a section, or its mixture."""
  wants = {n: _want(n, o, n in lenient) for n, o in section["columns"].items()}
  options = {"memory_limit": limit or MEMORY_LIMIT}
  if not section["mixture"]:
    return open_source(
      section["source"], split, section["data_dir"] or None, wants=wants, **options
    )
  sources, weights = [], []
  for number, part in enumerate(section["mixture"]):
    name, own_split, data_dir, own, weight = _call(
      _part, f"data.mixture[{number}]", **part
    )
    mine = {}
    for column, base in section["columns"].items():
      if column not in own:
        mine[column] = wants[column]
      elif own[column] is not None:
        mine[column] = _want(column, {"kind": column} | base | own[column])
    sources.append(
      open_source(
        name,
        own_split or split,
        data_dir or section["data_dir"] or None,
        wants=mine,
        **options,
      )
    )
    weights.append(weight)
  return mixture.mixture(sources, weights)


def _part(*, source, train_split="", data_dir="", columns=None, weight=1.0):
  return source, train_split, data_dir, columns or {}, weight


def _labels(source, columns):
  """The class of each record by the first column of classes; None: there is none."""
  column = next((c for c in columns.values() if c.class_names is not None), None)
  if column is None or column.name not in source.gives:
    return None
  found = np.full(len(source), -1)
  for i, value in source.values(column.name):
    found[i] = column.describe(value)
  return found


def _balanced(source, columns, /, *, classes, each):
  found = _labels(source, columns)
  if found is None:
    raise DataError(f"{source.name} has no labels: data.balanced needs them")
  if (there := len(np.unique(found[found >= 0]))) < classes:
    raise DataError(
      f"{source.name} has {there} classes, fewer than data.balanced.classes, {classes}"
    )
  return mixture.balanced(source, found, each)


def _tokenizers(columns, source, workdir, started) -> dict[str, text.Tokenizer]:
  """The tokenizer of each column of texts; those of a run are in its workdir."""
  made, sharing = {}, {}
  for name, options in columns.items():
    if options.get("kind", name) == "text":
      sharing.setdefault(options.get("same_as") or name, []).append(name)
  for name, names in sharing.items():
    options = columns.get(name) or {}
    if options.get("kind", name) != "text" or options.get("same_as"):
      raise UserError(
        f"data.columns.{names[0]}.same_as is {name!r}, which is no column of texts with"
        " a tokenizer of its own"
      )

    def captions(names=names):
      found = (source.values(each, _SAMPLE) for each in names)
      return (said for _, value in itertools.chain(*found) for said in strings(value))

    where = f"data.columns.{name}"
    directory = None
    if workdir is not None:
      directory = epath.Path(workdir) / text.directory(name)
    one = text.of_run(directory, options, captions, started=started, where=where)
    for each in names:
      made[each] = text.with_length(one, columns[each].get("length"), where)
  return made
