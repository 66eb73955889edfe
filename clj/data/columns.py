"""Columns: what becomes of a value of a record. Nothing else knows what is in it.

    "columns": {
      "image": {"kind": "image", "memory_size": 32},
      "query": {"kind": "text", "field": "question", "tokenizer": "bpe", "length": 64},
      "answer": {"kind": "text", "same_as": "query", "length": 256},
      "label": {"kind": "label"},
    }

A kind is a function from the options of a config to a `Column`; COLUMNS lists them.
"""

import io
import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np

from clj.cli import UserError
from clj.data import images
from clj.data.order import mix, order, uniform
from clj.data.source import DataError, Source, first_line, plain_text
from clj.data.text import Tokenizer


class Shape(NamedTuple):
  """Shape and dtype of an array."""

  shape: tuple[int, ...]
  dtype: Any

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Column(NamedTuple):
  """How a value of a record, as it was stored, becomes rows of a batch.

  Attributes:
    name: the first of its keys.
    spec, test_spec: keys -> `Shape` of a row, in training and in evaluation.
    held_spec: of a row in training where it is held in memory; None: as `spec`.
    train: (value, seed, position) -> item; what is drawn is keyed by (seed, position).
    test: value -> item. Both raise where the value is broken.
    rows: list of items -> {key: rows}.
    stored: `Shape` of a value held in memory; None: a list of them.
    store: value -> what is held of it.
    pack: what is held, [N, ...] or a list with None for what is absent -> arrays.
    gather: (arrays, records, seed, positions) -> {key: rows}; seed None: evaluation.
    held_bytes: of a record in memory; None: it is never held.
    fill: {key: number} of rows that are empty; 0 where it says nothing.
    describe: value -> what people read of it; None: nothing.
    saved: JSON-able, kept in a checkpoint and compared.
    limits: {key: number that its values stay below}.
    valid: whether rows may lack it: there is a key NAME_valid, bool.
    tokenizer, class_names: of a kind that has them.
    held_key: the option that decides whether it is held, for messages.
  """

  name: str
  spec: dict[str, Shape]
  test_spec: dict[str, Shape]
  train: Callable
  test: Callable
  rows: Callable
  store: Callable
  gather: Callable
  stored: Shape | None = None
  pack: Callable = lambda held: held
  held_spec: dict[str, Shape] | None = None
  held_bytes: int | None = None
  fill: dict[str, float] = {}
  describe: Callable | None = None
  saved: dict = {}
  limits: dict[str, int] = {}
  valid: bool = False
  tokenizer: Tokenizer | None = None
  class_names: tuple[str, ...] | None = None
  held_key: str = ""


class About(NamedTuple):
  """What a kind is told beside its options.

  name: of the column. field: that it is made of. source: the training split; None: it
  is not there, and only shapes are asked for. crops: of its pictures on the host.
  tokenizer: of its texts. view: how many columns before it are made of the same field.
  """

  name: str
  field: str = ""
  source: Source | None = None
  crops: tuple = ()
  tokenizer: Tokenizer | None = None
  view: int = 0

  def error(self, option: str, value, said: str) -> UserError:
    return UserError(f"data.columns.{self.name}.{option} is {value!r}; {said}")


def _stack(items):
  return {key: np.stack([item[key] for item in items]) for key in items[0]}


def _there(value, about):
  if value is None or (isinstance(value, str | bytes) and not value):
    raise UserError(f"it has no {about.field}")
  return value


# Pictures.


def image(
  about: About,
  /,
  *,
  field: str = "",
  size: int = 0,
  eval_crop: float = 0.875,
  memory_size: int = 0,
) -> Column:
  """Pictures: uint8, [H, W, 3] held in memory, else crops [V, size, size, 3].

  Args:
    size: side in evaluation, [1, size, size, 3]; 0: of the crops in training.
    eval_crop: share of the shorter side that evaluation keeps, see
      `images.crop_centrally`.
    memory_size: side of the squares that are held in memory; 0: pictures are decoded
      as they come, unless they are small and all of one size.
  """
  del field
  shape = about.source.shapes.get(about.name, (None,)) if about.source else (None,)
  held = (memory_size, memory_size) if memory_size else shape[:2]
  held = None if None in held else held
  size = size or next((each.size for each in about.crops), held[0] if held else 0)
  if not isinstance(size, int) or size <= 0:
    said = "it is in pixels; without it an entry of data.augment must make views of it"
    raise about.error("size", size, said)

  def decode(value):
    value = _there(value, about)
    return images.decode(value) if isinstance(value, bytes) else np.asarray(value)

  def train(value, seed, position):
    return images.crops(decode(value), about.crops, seed, position)

  def test(value):
    crop = images.crop_centrally(decode(value), size, eval_crop)
    return {about.name: crop[None]}

  def gather(arrays, records, seed, positions):
    if seed is None:
      return _stack([test(arrays[i]) for i in records])
    return {about.name: arrays.take(records, axis=0)}

  stored = Shape((*held, 3), np.uint8) if held else None
  streamed = {
    each.key: Shape((each.views, each.size, each.size, 3), np.uint8)
    for each in about.crops
  }
  return Column(
    about.name,
    streamed,
    {about.name: Shape((1, size, size, 3), np.uint8)},
    train,
    test,
    _stack,
    store=lambda value: images.fit(decode(value), *held),
    gather=gather,
    stored=stored,
    held_spec={about.name: stored} if held else None,
    held_bytes=stored.nbytes if held else None,
    held_key=f"data.columns.{about.name}.memory_size" if memory_size else "",
  )


def picture(value) -> np.ndarray:
  """The picture of a value as it was stored, uint8 [H, W, 3]."""
  return images.decode(value) if isinstance(value, bytes) else np.asarray(value)


# Texts.


def strings(value) -> list[str]:
  """The texts of a value: a string or several, none of them blank."""
  several = isinstance(value, list | tuple | np.ndarray)
  there = [x for x in (value if several else [value]) if x is not None and x == x]
  return [text for x in there if (text := plain_text(x).strip())]


def _draw(seed, positions, counts, view):
  """Which of `counts` texts a record gives; another one to each column of a field."""
  counts = np.asarray(counts, np.uint64)
  drawn = mix(seed, positions, -1) % counts
  if view:
    others = np.maximum(counts, np.uint64(2)) - np.uint64(1)
    step = (mix(seed, positions, -2) + np.uint64(view - 1)) % others
    drawn = (drawn + np.uint64(1) + step) % counts
  return drawn.astype(np.int64)


def text(
  about: About,
  /,
  *,
  field: str = "",
  length: int,
  tokenizer: str = "",
  vocab_size: int | None = None,
  clean: str | None = None,
  pad_id: int | None = None,
  same_as: str = "",
) -> Column:
  """Texts: NAME, ids int32 [L], and NAME_mask, bool [L], True at real tokens.

  Of several texts of a record, training draws one, and evaluation takes the first. A
  second column of the same field draws another one than the first does.

  Args:
    length: L.
    tokenizer, vocab_size, clean, pad_id: see `text.open_tokenizer`.
    same_as: the column whose tokenizer this one shares.
  """
  del field, tokenizer, vocab_size, clean, pad_id, same_as
  name, mask, made = about.name, f"{about.name}_mask", about.tokenizer
  spec = {name: Shape((length,), np.int32), mask: Shape((length,), np.bool_)}

  def texts(value):
    if not (said := strings(value)):
      raise UserError(f"it has no {about.field}")
    return said

  def train(value, seed, position):
    said = texts(value)
    return said[int(_draw(seed, position, len(said), about.view))]

  def rows(items):
    ids, masks, _ = made.encode(items)
    return {name: ids, mask: masks}

  def pack(held):
    ids, masks, cut = made.encode([x for each in held for x in each or [""]])
    for row in np.flatnonzero([each is None for each in held for _ in each or [""]]):
      ids[row], masks[row] = made.pad_id, False
    first = np.cumsum([0, *(len(each or [""]) for each in held)])
    return {"ids": ids, "mask": masks, "first": first, "cut": cut / max(1, len(ids))}

  def gather(arrays, records, seed, positions):
    row, end = arrays["first"][records], arrays["first"][records + 1]
    if seed is not None:
      row = row + _draw(seed, positions, end - row, about.view)
    return {
      name: arrays["ids"].take(row, axis=0),
      mask: arrays["mask"].take(row, axis=0),
    }

  return Column(
    name,
    spec,
    spec,
    train,
    lambda value: texts(value)[0],
    rows,
    store=texts,
    pack=pack,
    gather=gather,
    held_bytes=length * 5,
    fill={name: made.pad_id if made else 0},
    describe=strings,
    saved=made.settings if made else {},
    limits={name: made.vocab_size} if made else {},
    tokenizer=made,
  )


# Classes.


def class_text(value) -> str | None:
  """The name of a class as a table has it: the same text is the same class.

  Blank, None and NaN are none.
  """
  value = value.item() if isinstance(value, np.generic) else value
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  if value is None or value != value:
    return None
  return plain_text(value).strip() or None


def distinct(values) -> tuple[str, ...]:
  """The classes among values, sorted: as numbers where all are whole numbers."""
  found = {name for value in values if (name := class_text(value)) is not None}
  if all(re.fullmatch(r"-?\d{1,18}", name) for name in found):
    return tuple(sorted(found, key=lambda name: (int(name), name)))
  return tuple(sorted(found))


def label(about: About, /, *, field: str = "") -> Column:
  """Classes: int32, numbered as in the training split; -1 where there is none.

  A class is a number with a name, as in TFDS, or whatever text or number stands there.
  """
  del field
  name, source = about.name, about.source
  given = source.class_names.get(name) if source else None
  names = given
  if names is None and source is not None and name in source.gives:
    names = distinct(value for _, value in source.values(name))
  number = {each: i for i, each in enumerate(names or ())}
  coded = range(len(given or ()))

  def number_of(value):
    if given is not None and not isinstance(value, str | bytes | None):
      value = int(value)
      return value if value in coded else -1
    return number.get(class_text(value), -1)

  def item(value, *_):
    return {name: np.int32(number_of(value))}

  return Column(
    name,
    {name: Shape((), np.int32)},
    {name: Shape((), np.int32)},
    item,
    item,
    _stack,
    store=number_of,
    stored=Shape((), np.int32),
    gather=lambda arrays, records, *_: {name: arrays.take(records)},
    held_bytes=4,
    fill={name: -1},
    describe=number_of,
    limits={name: len(names)} if names else {},
    class_names=names or None,
  )


# Numbers.


def numbers(value) -> np.ndarray:
  """The array of a value: numbers, nested lists of them, their JSON, .npy or a picture.

  64 bits become 32: that is what accelerators compute with.
  """
  if isinstance(value, bytes) and value[:6] == b"\x93NUMPY":
    value = np.load(io.BytesIO(value), allow_pickle=False)
  elif isinstance(value, bytes) and (whole := _unchanged(value)) is not None:
    value = whole
  elif isinstance(value, str | bytes):
    value = np.asarray(json.loads(value), np.float32)
  array = np.asarray(value)
  if array.dtype == object or array.dtype.kind not in "biuf":
    raise UserError("it is no array of numbers")
  small = {"f8": "f4", "i8": "i4", "u8": "i4", "u4": "i4"}.get(array.dtype.str[1:])
  return _as(array, small or array.dtype)


def _unchanged(data):
  """An encoded picture with its own channels and bits, [H, W] or [H, W, C], or None."""
  try:
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
  except cv2.error:
    return None
  if found is not None and found.ndim == 3:
    order = [2, 1, 0, 3][: found.shape[2]]  # OpenCV has blue first
    found = found[..., order]
  return found


def _as(array, dtype):
  made = array.astype(dtype)
  if made.dtype.kind in "biu" and not np.array_equal(made, array):
    raise UserError(f"its numbers do not fit in {made.dtype}")
  return made


class UnknownShape(UserError):
  """Of a column whose shape only the data tell, which were not asked."""


def array(
  about: About,
  /,
  *,
  field: str = "",
  length: int | None = None,
  dtype: str | None = None,
) -> Column:
  """Arrays: NAME as it is, or with `length` cut or padded to it, with NAME_mask.

  Args:
    length: rows of each array, where they differ; NAME_mask, bool [length], is True at
      those that are there.
    dtype: of NAME; None: as stored, but no more than 32 bits, and float32 from text.
  """
  del field
  name, mask = about.name, f"{about.name}_mask"

  def plain(value):
    made = numbers(_there(value, about))
    return made if dtype is None else _as(made, dtype)

  like = _first_good(about, plain) if about.source else None
  if like is None:
    raise UnknownShape(f"data.columns.{name}: its shape is known from the data alone")
  if length is not None and not like.ndim:
    raise about.error("length", length, "but each value is one number: leave it out")
  inner, kind = like.shape[1:], np.dtype(dtype or like.dtype)
  shape = Shape((length, *inner) if length else like.shape, kind)

  def fitted(value):
    made = _as(plain(value), kind)
    wrong = made.shape[1:] != inner if length else made.shape != shape.shape
    if wrong or (length and not made.ndim):
      where = "" if length else f": data.columns.{name}.length pads arrays to one"
      raise UserError(f"its shape is {made.shape}, not {shape.shape}{where}")
    return made[:length] if length else made

  def item(value, *_):
    made = fitted(value)
    if not length:
      return {name: made}
    whole = np.zeros(shape.shape, kind)
    whole[: len(made)] = made
    return {name: whole, mask: np.arange(length) < len(made)}

  def pack(held):
    if not length:
      return held
    items = [item(x) if x is not None else _empty(spec) for x in held]
    return _stack(items)

  def gather(arrays, records, *_):
    arrays = arrays if length else {name: arrays}
    return {key: each.take(records, axis=0) for key, each in arrays.items()}

  spec = {name: shape} | ({mask: Shape((length,), np.bool_)} if length else {})
  return Column(
    name,
    spec,
    spec,
    item,
    item,
    _stack,
    store=fitted,
    stored=None if length else shape,
    pack=pack,
    gather=gather,
    held_bytes=shape.nbytes,
  )


def _empty(spec):
  return {key: np.zeros(each.shape, each.dtype) for key, each in spec.items()}


def _first_good(about, make):
  """A value of the training split, made; tells shape and dtype of the others."""
  source, reason = about.source, None
  sample = order(0, np.arange(min(8, len(source))), len(source)).tolist()
  for record in source.read(sample, [about.name]):
    try:
      if isinstance(record, Exception):
        raise record
      if about.name in record:
        return make(record[about.name])
    except Exception as error:
      reason = error
  raise DataError(
    f"{source.name}: data.columns.{about.name} cannot be made of {about.field!r}"
    f" ({first_line(reason) if reason else 'no record has it'})"
  )


# Sounds.


def sound(value, rate: int) -> np.ndarray:
  """Samples float32 [n] of one channel at `rate`, of a file's bytes or (samples, rate).

  Channels are averaged. Resampled by soxr.
  """
  if isinstance(value, tuple):
    samples, own = value
    samples = np.asarray(samples)
    if samples.dtype.kind in "iu":
      bits = 16 if np.abs(samples).max(initial=0) <= 1 << 15 else 32
      samples = samples / float(1 << bits - 1)
    samples = samples.astype(np.float32)
  else:
    library = _optional("soundfile", "audio is decoded")
    try:
      samples, own = library.read(io.BytesIO(value), dtype="float32")
    except library.LibsndfileError as error:
      raise UserError(f"it is no sound ({first_line(error)})") from None
  if samples.ndim == 2:
    samples = samples.mean(1)
  if own != rate:
    samples = _optional("soxr", "audio is resampled").resample(samples, own, rate)
  return np.ascontiguousarray(samples, np.float32)


def _optional(module, what):
  try:
    return __import__(module)
  except ImportError:
    raise MissingLibrary(f"{what} by {module}: pip install {module}") from None


class MissingLibrary(UserError):
  """What is not installed; no fault of a record."""


def audio(
  about: About,
  /,
  *,
  field: str = "",
  rate: int = 16000,
  seconds: float = 1.0,
  memory: bool = False,
) -> Column:
  """Sounds: NAME, float32 [samples], and NAME_mask, bool, False where it is filled up.

  Of a longer one training takes a window at random, evaluation the middle; a shorter
  one is followed by silence.

  Args:
    rate: samples a second. seconds: of a row.
    memory: whether all are decoded now and held.
  """
  del field
  name, mask, count = about.name, f"{about.name}_mask", round(rate * seconds)
  spec = {name: Shape((count,), np.float32), mask: Shape((count,), np.bool_)}

  def decode(value):
    return sound(_there(value, about), rate)

  def starts(lengths, seed, positions):
    room = np.maximum(np.asarray(lengths) - count, 0)
    chance = 0.5 if seed is None else uniform(seed, positions, -3)
    return (chance * (room + (seed is not None))).astype(np.int64)

  def windows(values, first, lengths, seed, positions):
    at = starts(lengths, seed, positions)[:, None] + np.arange(count)
    there = at < lengths[:, None]
    at = np.where(there, first[:, None] + at, 0)
    made = values.take(at) if len(values) else np.zeros(at.shape, np.float32)
    return {name: np.where(there, made, np.float32(0)), mask: there}

  def one(value, seed, position):
    made = decode(value)
    lengths, first = np.array([len(made)]), np.zeros(1, np.int64)
    found = windows(made, first, lengths, seed, np.array([position]))
    return {key: each[0] for key, each in found.items()}

  def pack(held):
    held = [np.zeros(0, np.float32) if x is None else x for x in held]
    first = np.cumsum([0, *map(len, held)])
    return {"values": np.concatenate(held), "first": first}

  def gather(arrays, records, seed, positions):
    first = arrays["first"][records]
    lengths = arrays["first"][records + 1] - first
    return windows(arrays["values"], first, lengths, seed, positions)

  return Column(
    name,
    spec,
    spec,
    one,
    lambda value: one(value, None, 0),
    _stack,
    store=decode,
    pack=pack,
    gather=gather,
    held_bytes=count * 4 if memory else None,
    held_key=f"data.columns.{name}.memory" if memory else "",
  )


# Options that are of a data set; the others are of what a model is given.
OF_SOURCE = ("field", "memory_size", "memory")
COLUMNS = {"image": image, "text": text, "label": label, "array": array, "audio": audio}
