"""What there is to read: TFDS data sets, files of one's own, the embedded `shapes`."""

import numpy as np

from clj.data import shards, tables, tfds
from clj.data.files import open_folder
from clj.data.shapes import (
  COMPOSITION_SIZES,
  COMPOSITIONS,
  SHAPES,
  SIZES,
  compositions,
  shapes,
)
from clj.data.source import DataError, Source, Want, lacking, split_parts

EMBEDDED = ("shapes", "shapes/compositions")
MEMORY_LIMIT = 2 << 30  # bytes of a source that is held


def open_source(
  name: str,
  split: str,
  data_dir: str | None = None,
  *,
  wants: dict[str, Want],
  memory_limit: int = MEMORY_LIMIT,
) -> Source:
  """Opens a data set.

  Args:
    name: "shapes" or "shapes/compositions" (embedded); "folder:/path", "csv:/path",
      "parquet:/path" or "webdataset:/path" (see `files`, `tables` and `shards`);
      "hf://datasets/OWNER/NAME/PATH.parquet"; or a TFDS name, with a config and a
      version if need be ("cifar10", "my_set/config:1.0.0").
    split: a name or TFDS's syntax for parts of it, "train[:90%]", "train+test".
      A folder whose sub-folders are called train and test (or validation, val, valid)
      has these splits, "test" standing for whichever of the latter there is; any other
      folder is all "train". A class is a sub-folder of the split. Parts of a folder
      are mixed over the classes; parts of tables and shards are rows in their order.
    data_dir: where TFDS data lies prepared; None: TFDS_DATA_DIR, then TFDS's default.
    wants: the fields to read, by the column that is made of each.
    memory_limit: a table that is larger, in bytes, is refused.

  Raises:
    DataError: there is no such data set, split or field, it is empty, or it cannot be
      read at random. A TFDS set that is not prepared is downloaded if its server
      answers.
  """
  if not name:
    raise DataError(
      "the config names no data set: set data.source, such as folder:/path or a TFDS "
      "name (imported weights get it by --config when they are converted)"
    )
  if name in EMBEDDED:
    return _open_embedded(name, split, wants)
  kind = name.partition(":")[0]
  if kind == "folder":
    return open_folder(name, split, wants)
  if kind in ("csv", "parquet", "hf"):
    return tables.open_table(name, split, wants, memory_limit)
  if kind == "webdataset":
    return shards.open_shards(name, split, wants)
  return tfds.open_tfds(name, split, data_dir, wants)


def _open_embedded(name, split, wants):
  sizes, draw, class_names = SIZES, shapes, SHAPES
  if name == "shapes/compositions":
    sizes, draw, class_names = COMPOSITION_SIZES, compositions, COMPOSITIONS
  drawn = [
    (draw(part), slice(start, stop))
    for part, start, stop in split_parts(split, sizes, name)
  ]
  wants = lacking(name, wants, list(drawn[0][0]) if drawn else [])
  arrays = {}
  for column, want in wants.items():
    values = [each[want.field][part] for each, part in drawn]
    if isinstance(values[0], list):
      arrays[column] = sum(values, [])
    else:
      arrays[column] = np.concatenate(values)
  size = sum(len(each["label"][part]) for each, part in drawn)
  if not size:
    raise DataError(f"{name} {split} is empty")
  labels = {column for column, want in wants.items() if want.field == "label"}
  return Source(
    f"{name} {split}",
    size,
    tuple(wants),
    arrays=arrays,
    class_names=dict.fromkeys(labels, class_names),
    shapes={c: a.shape[1:] for c, a in arrays.items() if isinstance(a, np.ndarray)},
  )
