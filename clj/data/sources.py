"""What there is to read: TFDS data sets, image folders and the embedded `shapes`.

A `Source` is a table of records with random access. Small sets of equal pictures are
decoded once and held as arrays; everything else stays encoded until it is asked for.
"""

import dataclasses
import logging
import os
import threading
import types
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np
from etils import epath

from clj.data import images
from clj.data.order import order
from clj.data.shapes import (
  COMPOSITION_SIZES,
  COMPOSITIONS,
  SHAPES,
  SIZES,
  compositions,
  shapes,
)
from clj.data.text import Tokenizer

IMAGE_SUFFIXES = (
  ".jpg",
  ".jpeg",
  ".jpe",
  ".png",
  ".webp",
  ".bmp",
  ".gif",
  ".tif",
  ".tiff",
  ".ppm",
  ".pgm",
)
# A validation split under any of these names answers to "test".
_TEST_NAMES = ("test", "validation", "val", "valid")


class DataError(ValueError):
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
    read: `indices -> list of {"image": bytes, "label": int}`, the pictures encoded; a
      record that cannot be read comes as the exception. None where there are arrays.
      With `captioned`, "caption" is a list of strings.
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
        reason = _line(error).split(";")[0][:200]
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
        "%s: record %d is corrupt (%s), the next good one stands in for it; %d so far",
        self.name,
        index,
        reason,
        count,
      )


def open_source(
  name: str,
  split: str,
  data_dir: str | None = None,
  *,
  memory_limit: int = 2 << 30,
  memory_size: int = 0,
  caption: str | None = None,
  fields: dict[str, str] | None = None,
  class_names: Sequence[str] | None = None,
) -> Source:
  """Opens a data set.

  Args:
    name: "shapes" or "shapes/compositions" (embedded); "folder:/path", any tree of
      images; or a TFDS name, with a config and a version if need be ("cifar10",
      "my_set/config:1.0.0").
    split: a name or TFDS's syntax for parts of it, "train[:90%]", "train+test".
      A folder whose sub-folders are called train and test (or validation, val, valid)
      has these splits, "test" standing for whichever of the latter there is; any other
      folder is all "train". A class is a sub-folder of the split. Parts of a folder
      are mixed over the classes.
    data_dir: where TFDS data lies prepared; None: TFDS_DATA_DIR, then TFDS's default.
    memory_limit: TFDS pictures of one fixed size that decode to at most this many
      bytes are decoded now and held; 0: never.
    memory_size: pictures of any size are decoded now and held as squares of this side
      (`images.fit`), in pixels; 0: as they are.
    caption: the field that holds captions, a string or several; None: no captions.
    fields: names of the fields "image" and "label", where they are called otherwise.
      A label that is a string is numbered by the strings of this split, sorted.
    class_names: numbers it by these: those of the training split.

  Raises:
    DataError: there is no such data set or split, it is empty, or it cannot be read at
      random. A TFDS set that is not prepared is downloaded if its server answers.
  """
  fields = {"image": "image", "label": "label"} | (fields or {}) | {"caption": caption}
  if name in ("shapes", "shapes/compositions"):
    return _open_shapes(name, split, caption)
  if name.startswith("folder:"):
    source = _open_folder(name, split)
  else:
    source = _open_tfds(name, split, data_dir, memory_limit, fields, class_names)
  if not memory_size or source.arrays is not None:
    return source
  if (needed := len(source) * memory_size**2 * 3) > memory_limit:
    raise DataError(
      f"{source.name} at data.memory_size {memory_size} takes {needed / 2**30:.1f} GiB"
      f" of {memory_limit / 2**30:.1f}: lower it, or set it to 0 to stream the pictures"
    )
  return load(source, (memory_size, memory_size))


def open_config(data: dict, split: str, like: Source | None = None) -> Source:
  """Opens a split by the section `data` of a config.

  split: "train_split" or "test_split". like: the training source, whose class names
    and tokenizer the other split shall have.
  """
  source = open_source(
    data["source"],
    data[split],
    data["data_dir"] or None,
    memory_size=data.get("memory_size", 0),
    caption=data["text"].get("field", "caption") if data.get("text") else None,
    fields=data.get("fields"),
    class_names=like.class_names if like else None,
  )
  if like is not None and like.tokenizer is not None:
    source = tokenized(source, like.tokenizer)
  return source


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


def _parts(split, sizes, name):
  """Resolves a split in TFDS's syntax to [(split name, start, stop)]."""
  if split in sizes:
    return [(split, 0, sizes[split])]
  import tensorflow_datasets as tfds

  try:
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(
      {key: types.SimpleNamespace(num_examples=n) for key, n in sizes.items()}
    )
  except (ValueError, KeyError, AssertionError) as error:
    raise DataError(_no_split(name, split, sizes, error)) from None
  return [(p.splitname, p.from_ or 0, sizes[p.splitname] if p.to is None else p.to)
          for p in parts]  # fmt: skip


def _no_split(name, split, splits, error):
  return f"{name} has no split {split!r} ({_line(error)}); it has: {', '.join(splits)}"


def _line(error):
  """The first line of an exception's message."""
  return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


def _open_shapes(name, split, caption):
  if caption not in (None, "caption"):
    raise DataError(f"{name} has no field {caption!r} of captions; it has: caption")
  sizes, draw, class_names = SIZES, shapes, SHAPES
  if name == "shapes/compositions":
    sizes, draw, class_names = COMPOSITION_SIZES, compositions, COMPOSITIONS
  arrays, captions = [], []
  for part, start, stop in _parts(split, sizes, name):
    drawn = draw(part)
    arrays.append({key: drawn[key][start:stop] for key in ("image", "label")})
    said = drawn["caption"][start:stop]
    captions += said if isinstance(said, list) else [[c] for c in said.tolist()]
  arrays = {key: np.concatenate([p[key] for p in arrays]) for key in arrays[0]}
  size = len(arrays["image"])
  if not size:
    raise DataError(f"{name} {split} is empty")
  arrays["index"] = np.arange(size, dtype=np.int32)
  return Source(
    f"{name} {split}",
    size,
    _keys(True),
    class_names,
    arrays,
    captioned=caption is not None,
    captions=captions if caption else None,
  )


def _keys(labelled):
  return ("index", "image", "label") if labelled else ("index", "image")


# Image folders.


def _open_folder(name, split):
  root = os.path.expanduser(name.removeprefix("folder:"))
  if not os.path.isdir(root):
    raise DataError(f"{name}: there is no folder {root!r}")
  inside = {entry.name for entry in os.scandir(root) if entry.is_dir()}
  test = next((x for x in _TEST_NAMES if x in inside), None)
  if "train" in inside and test:
    folders = {"train": "train", "test": test, test: test}
  else:
    folders = {"train": ""}
  # Only what the split names is scanned: a pod's training folder holds millions.
  wanted = [x for x in folders if x in split] or list(folders)
  found = {x: _scan(os.path.join(root, folders[x])) for x in wanted}
  total = sum(len(found[x][0]) for x in wanted)
  if not total:
    others = sum(found[x][1] for x in wanted)
    raise DataError(
      f"{name} {split}: no image in {root!r}, {others} other files;"
      f" an image ends in {' '.join(IMAGE_SUFFIXES)}"
    )
  parts = _parts(split, {x: len(found[x][0]) for x in wanted}, name)
  files = [(x, f) for x, start, stop in parts for f in _part(found[x][0], start, stop)]
  if not files:
    raise DataError(
      f"{name} {split} is empty, of {total} images in all;"
      " set data.train_split and data.test_split"
    )
  # Test classes are numbered as the training classes are.
  named = found.get("train") or _scan(os.path.join(root, folders["train"]))
  classes = sorted({f.split("/")[0] for f in named[0] if "/" in f})
  number = {x: i for i, x in enumerate(classes)}
  paths = [os.path.join(root, folders[x], f) for x, f in files]
  labels = [number.get(f.split("/")[0], -1) if "/" in f else -1 for _, f in files]

  def read(indices):
    records = []
    for i in indices:
      try:
        with open(paths[i], "rb") as file:
          records.append({"image": file.read(), "label": labels[i]})
      except OSError as error:
        records.append(error)
    return records

  return Source(
    f"{name} {split}",
    len(paths),
    _keys(classes),
    tuple(classes) or None,
    read=read,
    files=tuple(paths),
  )


def _scan(root):
  """Images below `root`, relative, in one order on every host; number of others."""
  found, others, seen = [], 0, set()
  for folder, inside, names in os.walk(root, followlinks=True):
    real = os.path.realpath(folder)
    if real in seen:  # A link that leads back up.
      inside.clear()
      continue
    seen.add(real)
    inside[:] = [x for x in inside if not x.startswith(".")]
    relative = os.path.relpath(folder, root)
    for name in names:
      if name.startswith(".") or not name.lower().endswith(IMAGE_SUFFIXES):
        others += 1
      else:
        path = os.path.join(relative, name) if relative != "." else name
        found.append(path.replace(os.sep, "/"))
  return sorted(found), others


def _part(paths, start, stop):
  """A part of a folder, mixed over its classes by a hash of the names."""
  mixed = sorted(paths, key=lambda path: (zlib.crc32(path.encode()), path))
  return sorted(mixed[start:stop])


# TensorFlow Datasets, read without TensorFlow.


def _open_tfds(name, split, data_dir, memory_limit, fields, class_names):
  import tensorflow_datasets as tfds

  data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or tfds.core.constants.DATA_DIR
  data_dir = os.path.expanduser(str(data_dir))
  builder = _prepared(name, data_dir) or _prepare(name, data_dir)
  info = builder.info
  formats = info.available_file_formats() | {info.file_format}
  array_record = tfds.core.FileFormat.ARRAY_RECORD
  if array_record not in formats:
    raise DataError(
      f"{name} in {info.data_dir} is in {info.file_format.value} format, and random"
      " access needs ArrayRecord; this adds it (and needs TensorFlow): python -m"
      " tensorflow_datasets.scripts.convert_format --out_file_format=array_record"
      f" --dataset_version_dir={info.data_dir}"
    )
  wanted = _wanted(name, dict(info.features), fields)
  try:
    size = info.splits[split].num_examples
  except (ValueError, KeyError, AssertionError) as error:
    raise DataError(_no_split(name, split, info.splits, error)) from None
  if not size:
    raise DataError(f"{name} {split} is empty")
  records = builder.as_data_source(
    split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
  )
  files = [x.filename for x in info.splits[split].file_instructions]
  with futures.ThreadPoolExecutor(16) as pool:  # a bucket answers slowly
    there = list(pool.map(lambda file: epath.Path(file).exists(), files))
  if not all(there):
    file = files[there.index(False)]
    raise DataError(f"{name} lacks the file {file}: prepare it again")

  label, caption = wanted.get("label"), wanted.get("caption")
  named = {fields[key]: feature for key, feature in wanted.items()}
  example = tfds.features.FeaturesDict(named)
  encoded = {fields["image"]: tfds.decode.SkipDecoding()}
  if isinstance(label, tfds.features.Text):
    class_names = class_names or _strings(records, fields["label"])
    number = {x: i for i, x in enumerate(class_names)}
  elif label is not None:
    class_names = label.names

  def parse(raw):
    record = example.deserialize_example_np(raw, decoders=encoded)
    parsed = {"image": record[fields["image"]], "label": -1}
    if isinstance(label, tfds.features.Text):
      parsed["label"] = number.get(_string(record[fields["label"]]), -1)
    elif label is not None:
      parsed["label"] = int(record[fields["label"]])
    if caption is not None:
      said = record[fields["caption"]]
      said = [said] if isinstance(said, bytes | str) else list(said)
      parsed["caption"] = [c for c in map(_string, said) if c.strip()]
    return parsed

  def read(indices):
    indices = [int(i) for i in indices]
    try:
      return [parse(raw) for raw in records.__getitems__(indices)]
    except Exception as error:
      if "interpreter shutdown" in str(error):
        raise  # This process ends while a batch ahead is being read.
      # One of them is corrupt: the reader cannot say which.
      if len(indices) == 1:
        return [error]
      return [read([i])[0] for i in indices]

  source = Source(
    f"{name} {split}",
    len(records),
    _keys(label is not None),
    None if label is None else tuple(class_names),
    read=read,
    captioned=caption is not None,
  )
  shape = wanted["image"].shape
  if None not in shape and len(source) * shape[0] * shape[1] * 3 <= memory_limit:
    return load(source, shape[:2])
  return source


def _wanted(name, features, fields):
  """The features that are read, by "image", "label" and "caption"."""
  from tensorflow_datasets import features as kinds

  wanted = {key: features.get(field) for key, field in fields.items()}
  listed = ", ".join(sorted(features))
  lacks = f"{name} has no feature {{!r}} that {{}}; it has: {listed}"
  if not isinstance(wanted["image"], kinds.Image):
    raise DataError(lacks.format(fields["image"], "is an image"))
  strings = lambda f: isinstance(getattr(f, "feature", f), kinds.Text)
  if fields["caption"] is None:
    del wanted["caption"]
  elif not strings(wanted["caption"]):
    raise DataError(lacks.format(fields["caption"], "is text (data.text.field)"))
  if not isinstance(wanted["label"], kinds.ClassLabel | kinds.Text):
    if fields["label"] != "label":
      raise DataError(lacks.format(fields["label"], "has classes"))
    del wanted["label"]
  return wanted


def _string(value):
  return value.decode() if isinstance(value, bytes) else str(value)


def _strings(records, field):
  """The distinct strings of a field, sorted."""
  from tensorflow_datasets import features as kinds

  feature = kinds.FeaturesDict({field: kinds.Text()})
  found = set()
  for start in range(0, len(records), 1024):
    block = range(start, min(start + 1024, len(records)))
    for raw in records.__getitems__(list(block)):
      found.add(_string(feature.deserialize_example_np(raw)[field]))
  return sorted(found)


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
    raise ValueError("it has no caption")
  return images.decode(record["image"])


def _prepared(name, data_dir):
  """The builder of what lies prepared in a directory, whatever its code says now."""
  import tensorflow_datasets as tfds

  try:
    return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    return None
  except Exception as error:
    raise DataError(f"{name!r} in {data_dir}: {_line(error)}") from None


def _prepare(name, data_dir):
  """Downloads a TFDS data set, or says at once why that is impossible.

  TFDS itself would try for minutes; so its server is asked first, for two seconds.
  """
  import tensorflow_datasets as tfds

  ways = (
    f"prepare it (tfds build {name} --file_format=array_record --data_dir={data_dir}),"
    " name the directory that holds it (data_dir, or TFDS_DATA_DIR), or take the"
    " embedded 'shapes' or your own 'folder:/path'"
  )
  try:
    cls = tfds.builder_cls(name.split("/")[0].split(":")[0])
  except Exception:
    raise DataError(
      f"{name!r} is not prepared in {data_dir} and TFDS does not know it: {ways}"
    ) from None
  if cls.MANUAL_DOWNLOAD_INSTRUCTIONS:
    why = "TFDS cannot download it by itself"
  elif not _answers(next(iter(cls.url_infos or {}), None)):
    why = "its server does not answer"
  else:
    try:
      logging.getLogger(__name__).warning("preparing %s in %s", name, data_dir)
      builder = tfds.builder(name, data_dir=data_dir)
      builder.download_and_prepare(file_format="array_record")
      return builder
    except ImportError as error:
      why = f"its preparation needs what is not installed ({_line(error)})"
    except Exception as error:
      why = f"its preparation failed ({_line(error)})"
  raise DataError(f"{name} is not prepared in {data_dir} and {why}: {ways}")


def _answers(url):
  """Whether a URL can be fetched, within two seconds, name look-up included."""
  if url is None:
    return False
  answer = []

  def ask():
    try:
      urllib.request.urlopen(url, timeout=2).close()
      answer.append(True)
    except Exception:
      pass

  thread = threading.Thread(target=ask, daemon=True)
  thread.start()
  thread.join(2)
  return bool(answer)
