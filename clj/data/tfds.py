"""TensorFlow Datasets, read without TensorFlow, at random."""

import functools
import importlib.util
import logging
import os
import threading
import urllib.request
from concurrent import futures

import numpy as np
from etils import epath

from clj.data.source import (
  KEY,
  DataError,
  Source,
  Want,
  first_line,
  no_split,
  plain_text,
)

# What is said of a feature that a column of this kind cannot be made of.
_NEEDS = {
  "image": "is an image",
  "text": "is text",
  "label": "has classes",
  "audio": "is audio",
  "array": "is an array",
}


def open_tfds(
  name: str, split: str, data_dir: str | None, wants: dict[str, Want]
) -> Source:
  """Opens a data set that lies prepared, or is prepared now if its server answers.

  Raises:
    DataError: see `clj.data.sources.open_source`.
  """
  import tensorflow_datasets as tfds

  data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or tfds.core.constants.DATA_DIR
  data_dir = os.path.expanduser(str(data_dir))
  _know_audio()
  builder = _prepared(name, data_dir) or _prepare(name, data_dir)
  info = builder.info
  formats = info.available_file_formats() | {info.file_format}
  if tfds.core.FileFormat.ARRAY_RECORD not in formats:
    raise DataError(
      f"{name} in {info.data_dir} is in {info.file_format.value} format, and random"
      " access needs ArrayRecord; this converts it: python -m clj.data.ingest"
      f" {info.data_dir} OTHER_DATA_DIR/{info.name}"
    )
  wants, features = _wanted(name, dict(info.features), wants)
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
  _check_files(name, [x.filename for x in parts])
  return Source(
    f"{name} {split}",
    len(records),
    tuple(wants),
    _reader(records, parts, dict(info.features), wants),
    class_names={
      column: tuple(feature.names)
      for column, feature in features.items()
      if isinstance(feature, tfds.features.ClassLabel)
    },
    shapes={c: f.shape for c, f in features.items() if None not in f.shape},
  )


@functools.cache
def _know_audio():
  """Makes TFDS know its feature Audio without TensorFlow, as what is stored of it."""
  if importlib.util.find_spec("tensorflow") is not None:
    return
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.features import feature as core

  class Audio:
    @staticmethod
    def from_json_content(value):
      if value.lazy_decode:
        made = tfds.features.Text()  # the file
      else:
        made = tfds.features.Tensor(
          shape=core.from_shape_proto(value.shape),
          dtype=core.dtype_from_str(value.dtype),
          encoding=value.encoding or "none",
        )
      made.sample_rate = int(value.sample_rate) or None
      return made

  name = "tensorflow_datasets.core.features.audio_feature.Audio"
  core.FeatureConnector._registered_features[name] = Audio


def _check_files(name, files):
  with futures.ThreadPoolExecutor(16) as pool:  # a bucket answers slowly
    there = list(pool.map(lambda file: epath.Path(file).exists(), files))
  if not all(there):
    file = files[there.index(False)]
    raise DataError(f"{name} lacks the file {file}: prepare it again")


def _reader(records, parts, features, wants):
  """`Source.reader` of a split in `parts`."""
  import tensorflow_datasets as tfds

  first = np.cumsum([0, *(x.take for x in parts)])
  files = [(os.path.basename(x.filename), x.skip) for x in parts]
  own = isinstance(features.get("key"), tfds.features.Text)  # of `clj.data.ingest`

  @functools.lru_cache(maxsize=8)
  def example(columns):
    """A parser of what some columns need, pictures and sounds left as they are; and
    (column, field, what makes its value) of each."""
    names = {wants[column].field for column in columns} | ({"key"} if own else set())
    named = {name: features[name] for name in names or list(features)[:1]}
    encoded = {
      name: tfds.decode.SkipDecoding()
      for name, feature in named.items()
      if isinstance(feature, tfds.features.Image) or hasattr(feature, "sample_rate")
    }
    parser = tfds.features.FeaturesDict(named)
    values = [(c, wants[c].field, _value_of(features, wants[c], own)) for c in columns]
    return lambda raw: parser.deserialize_example_np(raw, decoders=encoded), values

  def key_of(index, record):
    """The record's own key, or TFDS's id: its file and its place there."""
    if own:
      return plain_text(record["key"])
    part = np.searchsorted(first, index, side="right") - 1
    name, skip = files[part]
    return f"{name}__{index - first[part] + skip}"

  def parse(index, raw, columns):
    parser, values = example(columns)
    record = parser(raw)
    found = {column: make(record[field]) for column, field, make in values}
    return found | {KEY: key_of(index, record)}

  def read(indices, columns):
    indices, columns = [int(i) for i in indices], tuple(columns)
    try:
      found = records.__getitems__(indices)
      return [parse(i, raw, columns) for i, raw in zip(indices, found)]
    except Exception as error:
      if "interpreter shutdown" in str(error):
        raise  # This process ends while a batch ahead is being read.
      # One of them is corrupt: the reader cannot say which.
      if len(indices) == 1:
        return [error]
      return [read([i], columns)[0] for i in indices]

  return read


def _value_of(features, want, own):
  """What makes the value of a record of what TFDS gives.

  own: of `clj.data.ingest`, where the number -1 is no class.
  """
  rate = getattr(features[want.field], "sample_rate", None)
  if rate is not None:
    return lambda value: value if isinstance(value, bytes) else (value, rate)
  if own and want.kind == "label":
    return lambda value: None if np.array_equal(value, -1) else value
  plain = lambda value: isinstance(value, np.ndarray) and value.dtype == object
  return lambda value: value.tolist() if plain(value) else value


def _wanted(name, features, wants):
  """The wants that are there, and their features by column."""
  from tensorflow_datasets import features as kinds

  text = lambda f: isinstance(getattr(f, "feature", f), kinds.Text)
  serves = {
    "image": lambda f: isinstance(f, kinds.Image),
    "text": text,
    "label": lambda f: isinstance(f, kinds.ClassLabel | kinds.Text) or f.shape == (),
    "audio": lambda f: hasattr(f, "sample_rate") or isinstance(f, kinds.Text),
    "array": lambda f: not text(f) and not isinstance(f, kinds.FeaturesDict),
  }
  there = {}
  for column, want in wants.items():
    feature = features.get(want.field)
    if feature is not None and serves[want.kind](feature):
      there[column] = want
    elif not want.optional:
      where = f" ({want.where})" if want.where else ""
      raise DataError(
        f"{name} has no feature {want.field!r} that {_NEEDS[want.kind]}{where};"
        f" it has: {', '.join(sorted(features))}"
      )
  return there, {column: features[want.field] for column, want in there.items()}


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
