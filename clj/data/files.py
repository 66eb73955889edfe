"""Pictures in files of one's own: folders, tables and tar shards.

    folder:/path                 pictures, a caption a line in NAME.txt beside NAME.jpg
    csv:/path/table.csv          a row a picture: its path, a caption, a label
    parquet:/path/part-*.parquet the same, or the picture's bytes in the table
    webdataset:/path/*.tar       shards as img2dataset writes them

A `{split}` in a path stands for the split: csv:/path/{split}.csv. Without it all that
there is, is "train".
"""

import collections
import glob
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from etils import epath

from clj.cli import UserError
from clj.data.source import DataError, Source, first_line, keys_of, split_parts

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


# Folders.


def open_folder(name: str, split: str, caption: str | None = None) -> Source:
  """A tree of pictures. caption: None, or "caption" for those in text files beside."""
  root = os.path.expanduser(name.removeprefix("folder:"))
  if not os.path.isdir(root):
    raise DataError(f"{name}: there is no folder {root!r}")
  if caption not in (None, "caption"):
    raise DataError(
      f"{name} has no field {caption!r}: the captions of a folder, a line each in"
      " NAME.txt beside NAME.jpg, are called caption"
    )
  folders = folder_splits(root)
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
  parts = split_parts(split, {x: len(found[x][0]) for x in wanted}, name)
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
  names = [os.path.join(folders[x], f) for x, f in files]
  paths = [os.path.join(root, name) for name in names]
  labels = [number.get(f.split("/")[0], -1) if "/" in f else -1 for _, f in files]

  def read(indices):
    records = []
    for i in indices:
      try:
        record = {"image": _bytes(paths[i]), "label": labels[i]}
        record |= {"id": names[i], "path": paths[i]}
        if caption is not None:
          record["caption"] = _caption_beside(paths[i])
        records.append(record)
      except OSError as error:
        records.append(error)
    return records

  return Source(
    f"{name} {split}",
    len(paths),
    keys_of(classes),
    tuple(classes) or None,
    read=read,
    files=tuple(paths),
    captioned=caption is not None,
  )


def folder_splits(root: str) -> dict[str, str]:
  """The splits of a folder: name -> sub-folder, "" for all of it."""
  inside = {entry.name for entry in os.scandir(root) if entry.is_dir()}
  test = next((x for x in _TEST_NAMES if x in inside), None)
  if "train" in inside and test:
    return {"train": "train", "test": test, test: test}
  return {"train": ""}


def _caption_beside(path):
  try:
    said = _bytes(os.path.splitext(path)[0] + ".txt").decode(errors="replace")
  except FileNotFoundError:
    return []
  return [line.strip() for line in said.splitlines() if line.strip()]


def _bytes(path):
  if "://" in path:
    return epath.Path(path).read_bytes()
  with open(path, "rb") as file:
    return file.read()


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


def resolve(name: str, split: str) -> dict[str, list[str]]:
  """The files that "kind:pattern" names: split -> paths, sorted.

  The pattern may have `*`, `{split}` and, as img2dataset's users write them, numbers
  `{00000..00099}`.
  """
  pattern = os.path.expanduser(name.partition(":")[2])
  if "://" in pattern:
    raise DataError(
      f"{name} is not on a disk of this machine; copy it there, or read a data set that"
      " python -m clj.data.ingest made from it"
    )
  words = ["train"]
  if "{split}" in pattern:
    words = re.findall(r"[A-Za-z_]\w*", re.sub(r"\[[^]]*\]", "", split))
  found = {}
  for word in words:
    found[word] = []
    for each in _numbered(pattern.replace("{split}", word)):
      paths = glob.glob(each)
      if not paths:
        raise DataError(f"{name} {split}: there is no such file as {each}")
      found[word] += sorted(paths)
  return found


def _numbered(pattern):
  braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
  if braces is None:
    return [pattern]
  first, last = braces.groups()
  numbers = range(int(first), int(last) + 1)
  return [
    each
    for number in numbers
    for each in _numbered(
      f"{pattern[: braces.start()]}{number:0{len(first)}d}{pattern[braces.end() :]}"
    )
  ]


# Tables.


class Columns(NamedTuple):
  """A table whose columns "image", "label", "caption" are known by name.

  table: of pyarrow. names: key -> column. number: label -> class. folder: that relative
  paths start from.
  """

  table: object
  names: dict[str, str]
  number: dict
  folder: str

  def read(self, indices: Sequence[int]) -> list:
    """Records, or why there is none, as `Source.read` gives them."""
    columns = {key: self.table[name] for key, name in self.names.items()}
    records = []
    for i in map(int, indices):
      try:
        row = {key: column[i].as_py() for key, column in columns.items()}
        records.append(self._record(row, i))
      except (OSError, ValueError) as error:
        records.append(error)
    return records

  def _record(self, row, number):
    image, place = row["image"], {"id": str(number)}
    if isinstance(image, dict):  # as Hugging Face's data sets have it
      image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
      if re.match(r"https?://", image):
        raise UserError(f"{image} is not a file; img2dataset downloads such tables")
      place = {"id": image, "path": os.path.join(self.folder, image)}
      image = _bytes(place["path"])
    if not image:
      raise UserError("it has no picture")
    record = {"image": image, "label": self.number.get(row.get("label"), -1), **place}
    if "caption" in self.names:
      said = row["caption"]
      said = said if isinstance(said, list) else [said]
      record["caption"] = [c for c in said if isinstance(c, str) and c.strip()]
    return record


def open_table(name, split, fields, class_names, memory_limit) -> Source:
  """A table, all of it in memory; pictures are in the files that it names, or in it.

  fields: columns of "image", "label" and "caption"; None: no captions.
  """
  found = resolve(name, split)
  kind = name.partition(":")[0]
  size = sum(os.path.getsize(p) for paths in found.values() for p in paths)
  if size > memory_limit:
    raise DataError(
      f"{name} has {size / 2**30:.1f} GiB, too much to hold; python -m clj.data.ingest"
      f" {name} OUT makes it a data set that is read at random"
    )
  tables = {word: read_table(kind, paths, fields) for word, paths in found.items()}
  parts = split_parts(split, {w: t.num_rows for w, t in tables.items()}, name)
  import pyarrow

  table = pyarrow.concat_tables(
    [tables[word].slice(start, stop - start) for word, start, stop in parts],
    promote_options="permissive",
  ).combine_chunks()
  if not table.num_rows:
    raise DataError(f"{name} {split} is empty")
  names = {k: v for k, v in fields.items() if v in table.column_names}
  if "label" in names:
    class_names = class_names or distinct(table[names["label"]])
  number = numbers(class_names or ())
  folder = os.path.dirname(next(iter(found.values()))[0])
  columns = Columns(table, names, number, folder)
  return Source(
    f"{name} {split}",
    table.num_rows,
    keys_of("label" in names),
    tuple(map(str, class_names)) if "label" in names else None,
    read=columns.read,
    captioned="caption" in names,
  )


def read_table(kind: str, paths: Sequence[str], fields: dict[str, str | None]):
  """The columns `fields` of tables, a pyarrow table."""
  import pyarrow
  from pyarrow import csv, parquet

  tables = []
  for path in paths:
    try:
      if kind == "parquet":
        schema = parquet.read_schema(path)
        table = parquet.read_table(path, columns=check_columns(path, schema, fields))
      else:
        strings = [v for k, v in fields.items() if v and k != "label"]
        table = csv.read_csv(
          path,
          parse_options=csv.ParseOptions(
            delimiter=_delimiter(path), newlines_in_values=True
          ),
          convert_options=csv.ConvertOptions(
            column_types={name: pyarrow.string() for name in strings}
          ),
        )
        table = table.select(check_columns(path, table.schema, fields))
    except pyarrow.ArrowInvalid as error:
      raise DataError(f"{path} is no table ({first_line(error)})") from None
    tables.append(table)
  return pyarrow.concat_tables(tables, promote_options="permissive")


def check_columns(path: str, schema, fields: dict[str, str | None]) -> list[str]:
  """The columns of `fields` that a table has; only one called "label" may be absent."""
  for key, name in fields.items():
    optional = name is None or (key, name) == ("label", "label")
    if name not in schema.names and not optional:
      where = "data.text.field" if key == "caption" else f"data.fields.{key}"
      raise DataError(
        f"{path} has no column {name!r} ({where}); it has: {', '.join(schema.names)}"
      )
  return [name for name in fields.values() if name in schema.names]


def column_names(kind: str, path: str) -> list[str]:
  """The columns of a table."""
  from pyarrow import csv, parquet

  if kind == "parquet":
    return parquet.read_schema(path).names
  options = csv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True)
  with csv.open_csv(path, parse_options=options) as reader:
    return reader.schema.names


def row_groups(path: str, least: int) -> Iterator[tuple[list[int], int]]:
  """Row groups of a Parquet file that have `least` rows together, and their first."""
  from pyarrow import parquet

  metadata = parquet.read_metadata(path)
  groups, start, rows = [], 0, 0
  for group in range(metadata.num_row_groups):
    groups.append(group)
    rows += metadata.row_group(group).num_rows
    if rows >= least or group == metadata.num_row_groups - 1:
      yield groups, start
      groups, start, rows = [], start + rows, 0


def _delimiter(path):
  with open(path, errors="replace") as file:
    line = file.readline()
  return "\t" if line.count("\t") > line.count(",") else ","


def distinct(column) -> tuple:
  """The distinct values of a column, sorted; None is not one."""
  return tuple(sorted(v for v in column.unique().to_pylist() if v is not None))


def numbers(class_names: Sequence) -> dict:
  """Value of a label -> class; of numbers also as they were read."""
  by_name = {name: i for i, name in enumerate(class_names)}
  whole = {int(n): i for n, i in by_name.items() if re.fullmatch(r"-?\d+", str(n))}
  return by_name | whole


# Tar shards.

_KEY = re.compile(r"^((?:.*/)?[^/.]+)\.([^/]+)$")  # folder/key.extension
MEMBER_LIMIT = 256 << 20  # bytes; no picture, caption or description is larger


class Sample(NamedTuple):
  """Members of a tar shard with one key; error: why it is none."""

  key: str
  members: dict[str, tarfile.TarInfo]
  error: str | None = None


def samples(shard: tarfile.TarFile) -> Iterator[Sample]:
  """The samples of a shard, in its order: members side by side with the same key.

  A member whose path leaves the archive (absolute, or with ".."), and one that is no
  plain file, comes as a sample with an error. A shard that is cut short ends with one.
  """
  key, members, rest = None, {}, None
  while True:
    try:
      member = shard.next()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
      rest = f"the rest cannot be read ({first_line(error)})"
      break
    if member is None:  # tarfile takes a missing end, or half a header, for the end
      shard.fileobj.seek(shard.offset)
      if len(shard.fileobj.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        rest = "the rest is cut off"
      break
    if member.isdir():
      continue
    if error := _refused(member):
      yield Sample(member.name, {}, error)
      continue
    match = _KEY.match(member.name)
    if match is None:
      continue
    if match[1] != key:
      if members:
        yield Sample(key, members)
      key, members = match[1], {}
    members[match[2].lower()] = member
  if members:
    yield Sample(key, members)
  if rest is not None:
    yield Sample("", {}, rest)


def _refused(member):
  name = member.name.replace("\\", "/")
  if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
    return f"refused: {member.name!r} leads out of the archive"
  if not member.isreg():
    return f"refused: {member.name!r} is no plain file"
  if member.size > MEMBER_LIMIT:
    return f"refused: {member.name!r} has {member.size} bytes"
  return None


def sample_record(members: dict[str, bytes], fields: dict[str, str | None]) -> dict:
  """The record of a sample: extension -> content.

  The caption is NAME.txt, or another field, of NAME.json; the label is NAME.cls.

  Raises:
    ValueError: it has no picture, or its parts are broken.
  """
  record = {"label": -1}
  described = json.loads(members["json"]) if "json" in members else {}
  for extension in members:
    if f".{extension.rsplit('.')[-1]}" in IMAGE_SUFFIXES and "image" not in record:
      record["image"] = members[extension]
  if "image" not in record:
    raise UserError("it has no picture")
  record["label"] = int(members.get("cls", -1))
  if (field := fields["caption"]) is not None:
    said = described.get(field)
    if field in ("caption", "txt") and "txt" in members:
      said = members["txt"].decode(errors="replace")
    said = said if isinstance(said, list) else [said]
    record["caption"] = [c.strip() for c in said if isinstance(c, str) and c.strip()]
  return record


def open_shards(name, split, fields, class_names) -> Source:
  """Tar shards, read at random: all headers are looked at first."""
  found = resolve(name, split)
  shards, places = [], collections.defaultdict(list)
  for word, paths in found.items():
    for path in paths:
      shards.append(path)
      places[word] += _index(path, len(shards) - 1)
  parts = split_parts(split, {w: len(p) for w, p in places.items()}, name)
  places = [p for word, start, stop in parts for p in places[word][start:stop]]
  if not places:
    raise DataError(f"{name} {split} is empty")

  def read(indices):
    records = []
    for i in indices:
      shard, key, members = places[i]
      try:
        if isinstance(members, str):
          raise UserError(members)
        record = sample_record(_content(shards[shard], members), fields)
        records.append(record | {"id": f"{os.path.basename(shards[shard])}:{key}"})
      except (OSError, ValueError) as error:
        records.append(error)
    return records

  labelled = any("cls" in members for _, _, members in places)
  if labelled and class_names is None:
    labels = [
      _content(shards[s], {"cls": m["cls"]}) for s, _, m in places if "cls" in m
    ]
    class_names = tuple(map(str, range(max(int(x["cls"]) for x in labels) + 1)))
  return Source(
    f"{name} {split}",
    len(places),
    keys_of(labelled),
    class_names if labelled else None,
    read=read,
    captioned=fields["caption"] is not None,
  )


def _index(path, number):
  """The samples of a shard: its number, key, where the members lie or what is wrong."""
  try:
    with tarfile.open(path, "r:") as shard:
      return [
        (
          number,
          sample.key,
          sample.error
          or {x: (m.offset_data, m.size) for x, m in sample.members.items()},
        )
        for sample in samples(shard)
      ]
  except (tarfile.TarError, OSError) as error:
    raise DataError(
      f"{path} cannot be read at random ({first_line(error)}); if it is compressed,"
      " python -m clj.data.ingest takes it"
    ) from None


def _content(path, members):
  with open(path, "rb") as file:
    data = {}
    for extension, (offset, size) in members.items():
      file.seek(offset)
      data[extension] = file.read(size)
  return data
