"""Files of one's own: which there are, and folders of them.

    folder:/path                 pictures (or sounds), a caption a line in NAME.txt
                                 beside NAME.jpg, a class a sub-folder
    csv:/path/table.csv          a row a record, see `clj.data.tables`
    parquet:/path/part-*.parquet
    webdataset:/path/*.tar       shards of img2dataset, see `clj.data.shards`

A `{split}` in a path stands for the split: csv:/path/{split}.csv. Without it all that
there is, is "train".
"""

import glob
import os
import re
import zlib

from etils import epath

from clj.data.source import (
  KEY,
  PATH,
  DataError,
  Source,
  Want,
  lacking,
  plain_text,
  split_parts,
)

# What a file is, by the end of its name.
SUFFIXES = {
  "image": (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff",
            ".ppm", ".pgm", ".avif"),
  "audio": (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au"),
}  # fmt: skip
# A validation split under any of these names answers to "test".
_TEST_NAMES = ("test", "validation", "val", "valid")


def open_folder(name: str, split: str, wants: dict[str, Want]) -> Source:
  """A tree of files, each a record: "image" or "audio", "label", and "caption".

  Without a column of pictures or sounds the records are the text files.
  """
  root = os.path.expanduser(name.removeprefix("folder:"))
  if not os.path.isdir(root):
    raise DataError(f"{name}: there is no folder {root!r}")
  wants = lacking(name, wants, (*SUFFIXES, "label", "caption"))
  fields = [want.field for want in wants.values()]
  media = next((field for field in SUFFIXES if field in fields), "caption")
  suffixes = SUFFIXES.get(media, (".txt",))
  folders = folder_splits(root)
  # Only what the split names is scanned: a pod's training folder holds millions.
  wanted = [x for x in folders if x in split] or list(folders)
  found = {x: _scan(os.path.join(root, folders[x]), suffixes) for x in wanted}
  total = sum(len(found[x][0]) for x in wanted)
  if not total:
    others = sum(found[x][1] for x in wanted)
    raise DataError(
      f"{name} {split}: no {media} in {root!r}, {others} other files;"
      f" its name would end in {' '.join(suffixes)}"
    )
  parts = split_parts(split, {x: len(found[x][0]) for x in wanted}, name)
  files = [(x, f) for x, start, stop in parts for f in _part(found[x][0], start, stop)]
  if not files:
    raise DataError(
      f"{name} {split} is empty, of {total} files in all;"
      " set data.train_split and data.test_split"
    )
  # Test classes are numbered as the training classes are.
  named = found.get("train") or _scan(os.path.join(root, folders["train"]), suffixes)
  classes = tuple(sorted({f.split("/")[0] for f in named[0] if "/" in f}))
  flat = ("caption", *SUFFIXES)
  wants = lacking(name, wants, (*flat, "label") if classes else flat)
  names = [os.path.join(folders[x], f) for x, f in files]
  paths = [os.path.join(root, name) for name in names]

  def value(i, field):
    if field == "label":
      inside = files[i][1]
      return inside.split("/")[0] if "/" in inside else None
    return _caption_beside(paths[i]) if field == "caption" else read_file(paths[i])

  def read(indices, columns):
    records = []
    for i in indices:
      try:
        record = {column: value(i, wants[column].field) for column in columns}
        records.append(record | {KEY: names[i], PATH: paths[i]})
      except OSError as error:
        records.append(error)
    return records

  return Source(
    f"{name} {split}",
    len(paths),
    tuple(wants),
    read,
    class_names={c: classes for c, want in wants.items() if want.field == "label"},
    files=tuple(paths),
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
    said = plain_text(read_file(os.path.splitext(path)[0] + ".txt"))
  except FileNotFoundError:
    return []
  return [line.strip() for line in said.splitlines() if line.strip()]


def read_file(path: str) -> bytes:
  """All of a file, on a disk or in a bucket."""
  if "://" in path:
    return epath.Path(path).read_bytes()
  with open(path, "rb") as file:
    return file.read()


def _scan(root, suffixes):
  """Files below `root` that end so, relative, in one order; number of others."""
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
      if name.startswith(".") or not name.lower().endswith(suffixes):
        others += 1
      else:
        path = os.path.join(relative, name) if relative != "." else name
        found.append(path.replace(os.sep, "/"))
  return sorted(found), others


def _part(paths, start, stop):
  """A part of a folder, mixed over its classes by a hash of the names."""
  mixed = sorted(paths, key=lambda path: (zlib.crc32(path.encode()), path))
  return sorted(mixed[start:stop])


def resolve(name: str, split: str, find=None) -> dict[str, list[str]]:
  """The files that "kind:pattern" names: split -> paths, sorted.

  The pattern may have `*`, `{split}` and, as img2dataset's users write them, numbers
  `{00000..00099}`. find: gives the paths of a pattern; None: those on this machine.
  """
  pattern = name if find else os.path.expanduser(name.partition(":")[2])
  if "://" in pattern and not find:
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
      paths = (find or glob.glob)(each)
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
