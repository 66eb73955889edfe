"""What there is to read: TFDS data sets, files of one's own, the embedded `shapes`."""

import logging
import os
import threading
import urllib.request
from collections.abc import Sequence
from concurrent import futures

import numpy as np
from etils import epath

from clj.data import files
from clj.data.shapes import (
  COMPOSITION_SIZES,
  COMPOSITIONS,
  SHAPES,
  SIZES,
  compositions,
  shapes,
)
from clj.data.source import (
  DataError,
  Source,
  captions_of,
  first_line,
  keys_of,
  load,
  no_split,
  split_parts,
  tokenized,
)

__all__ = [
  "DataError",
  "Source",
  "captions_of",
  "load",
  "open_config",
  "open_source",
  "tokenized",
]


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
    name: "shapes" or "shapes/compositions" (embedded); "folder:/path", "csv:/path",
      "parquet:/path" or "webdataset:/path" (see `clj.data.files`); or a TFDS name, with
      a config and a version if need be ("cifar10", "my_set/config:1.0.0").
    split: a name or TFDS's syntax for parts of it, "train[:90%]", "train+test".
      A folder whose sub-folders are called train and test (or validation, val, valid)
      has these splits, "test" standing for whichever of the latter there is; any other
      folder is all "train". A class is a sub-folder of the split. Parts of a folder
      are mixed over the classes; parts of tables and shards are rows in their order.
    data_dir: where TFDS data lies prepared; None: TFDS_DATA_DIR, then TFDS's default.
    memory_limit: TFDS pictures of one fixed size that decode to at most this many
      bytes are decoded now and held; 0: never. A table that is larger (for 0: larger
      than 2 GiB) is refused.
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
  if not name:
    raise DataError(
      "the config names no data set: set data.source, such as folder:/path or a TFDS "
      "name (imported weights get it by --config when they are converted)"
    )
  if name in ("shapes", "shapes/compositions"):
    return _open_shapes(name, split, caption)
  kind = name.partition(":")[0]
  if kind == "folder":
    source = files.open_folder(name, split, caption)
  elif kind in ("csv", "parquet"):
    source = files.open_table(name, split, fields, class_names, memory_limit or 2 << 30)
  elif kind == "webdataset":
    source = files.open_shards(name, split, fields, class_names)
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


def _open_shapes(name, split, caption):
  if caption not in (None, "caption"):
    raise DataError(f"{name} has no field {caption!r} of captions; it has: caption")
  sizes, draw, class_names = SIZES, shapes, SHAPES
  if name == "shapes/compositions":
    sizes, draw, class_names = COMPOSITION_SIZES, compositions, COMPOSITIONS
  arrays, captions = [], []
  for part, start, stop in split_parts(split, sizes, name):
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
    keys_of(True),
    class_names,
    arrays,
    captioned=caption is not None,
    captions=captions if caption else None,
  )


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
      " access needs ArrayRecord; this converts it: python -m clj.data.ingest"
      f" {info.data_dir} OTHER_DATA_DIR/{info.name}"
    )
  wanted = _wanted(name, dict(info.features), fields)
  try:
    size = info.splits[split].num_examples
  except (ValueError, KeyError, AssertionError) as error:
    raise DataError(no_split(name, split, info.splits, error)) from None
  if not size:
    raise DataError(f"{name} {split} is empty")
  records = builder.as_data_source(
    split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
  )
  parts = info.splits[split].file_instructions
  files = [x.filename for x in parts]
  with futures.ThreadPoolExecutor(16) as pool:  # a bucket answers slowly
    there = list(pool.map(lambda file: epath.Path(file).exists(), files))
  if not all(there):
    file = files[there.index(False)]
    raise DataError(f"{name} lacks the file {file}: prepare it again")

  label, caption = wanted.get("label"), wanted.get("caption")
  named = {fields[key]: feature for key, feature in wanted.items()}
  own = dict(info.features).get("key")  # what `clj.data.ingest` calls a record
  if isinstance(own, tfds.features.Text) and "key" not in named:
    named["key"] = own
  first = np.cumsum([0, *(x.take for x in parts)])
  example = tfds.features.FeaturesDict(named)
  encoded = {fields["image"]: tfds.decode.SkipDecoding()}
  if isinstance(label, tfds.features.Text):
    class_names = class_names or _strings(records, fields["label"])
    number = {x: i for i, x in enumerate(class_names)}
  elif label is not None:
    class_names = label.names

  def id_of(index, record):
    """The record's own key, or TFDS's id: its file and its place there."""
    if "key" in named and "key" not in fields.values():
      return _string(record["key"])
    part = np.searchsorted(first, index, side="right") - 1
    place = index - first[part] + parts[part].skip
    return f"{os.path.basename(files[part])}__{place}"

  def parse(index, raw):
    record = example.deserialize_example_np(raw, decoders=encoded)
    parsed = {"image": record[fields["image"]], "label": -1, "id": id_of(index, record)}
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
      return [parse(i, raw) for i, raw in zip(indices, records.__getitems__(indices))]
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
    keys_of(label is not None),
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

  if len(records) > 100_000:
    logging.getLogger(__name__).warning(
      "reading all %d records for the classes of %r", len(records), field
    )
  feature = kinds.FeaturesDict({field: kinds.Text()})
  found = set()
  for start in range(0, len(records), 1024):
    block = range(start, min(start + 1024, len(records)))
    for raw in records.__getitems__(list(block)):
      found.add(_string(feature.deserialize_example_np(raw)[field]))
  return sorted(found)


def _prepared(name, data_dir):
  """The builder of what lies prepared in a directory, whatever its code says now."""
  import tensorflow_datasets as tfds

  try:
    return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    return None
  except Exception as error:
    raise DataError(f"{name!r} in {data_dir}: {first_line(error)}") from None


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
      why = f"its preparation needs what is not installed ({first_line(error)})"
    except Exception as error:
      why = f"its preparation failed ({first_line(error)})"
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
