"""Tar shards, webdataset:, as img2dataset and WebDataset write them.

A sample is the members side by side with one key: 00012.jpg, 00012.txt, 00012.json.
A field is an extension, or a key of the JSON; "image" and "audio" are whatever member
is one, "caption" is the txt, and "label" the cls.
"""

import collections
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from clj.cli import UserError
from clj.data.files import SUFFIXES, resolve
from clj.data.source import (
  KEY,
  DataError,
  Source,
  Want,
  first_line,
  plain_text,
  split_parts,
)

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
      yield from _by_key(key, members)
      key, members = match[1], {}
    members[match[2].lower()] = member
  yield from _by_key(key, members)
  if rest is not None:
    yield Sample("", {}, rest)


def _by_key(key, members):
  """The samples of members that agree up to the first dot: one, or by the last dot.

  A sample has a plain extension, or parts with names, 7.left.png and 7.right.png; else
  the dot belongs to the key.
  """
  parts = collections.defaultdict(dict)
  for extension, member in members.items():
    middle, _, last = extension.rpartition(".")
    parts[middle][last] = member
  named = all(len(x) == 1 for x in parts.values()) and len(parts) > 1
  if "" in parts or (named and not any(m.isdigit() for m in parts)):
    yield Sample(key, members)
  else:
    for middle, mine in parts.items():
      yield Sample(f"{key}.{middle}", mine)


def _refused(member):
  name = member.name.replace("\\", "/")
  if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
    return f"refused: {member.name!r} leads out of the archive"
  if not member.isreg():
    return f"refused: {member.name!r} is no plain file"
  if member.size > MEMBER_LIMIT:
    return f"refused: {member.name!r} has {member.size} bytes"
  return None


def sample_record(members: dict[str, bytes], wants: dict[str, Want]) -> dict:
  """The record of a sample: extension -> content.

  Raises:
    UserError: its JSON is broken.
  """
  described = json.loads(members["json"]) if "json" in members else {}
  if not isinstance(described, dict):
    raise UserError("its JSON is no object of fields")
  return {c: _value(members, described, want.field) for c, want in wants.items()}


def _value(members, described, field):
  if field in SUFFIXES:
    endings = SUFFIXES[field]
    found = (x for x in members if f".{x.rpartition('.')[2]}" in endings)
    field = next(found, field)
  elif field == "caption" and "txt" in members:
    field = "txt"
  elif field == "label" and "cls" in members:
    field = "cls"
  if field == "cls" and "cls" in members:
    said = plain_text(members["cls"]).strip()
    return None if re.fullmatch(r"-\d+", said) else said
  return members.get(field, described.get(field))


def _may_be_there(field: str, extensions: set[str]) -> bool:
  """Whether members with these extensions may have the field."""
  if field in SUFFIXES:
    return any(f".{x.rpartition('.')[2]}" in SUFFIXES[field] for x in extensions)
  also = {"caption": "txt", "label": "cls"}.get(field, field)
  return bool({field, also, "json"} & extensions)


def needed(wants: dict[str, Want]) -> set[str] | None:
  """The extensions that hold the wanted fields; None: all may be needed."""
  known = {"caption": {"txt", "json"}, "label": {"cls", "json"}, "cls": {"cls"}}
  fields = [want.field for want in wants.values()]
  if all(field in known for field in fields):
    return set().union(*(known[field] for field in fields))
  return None


def open_shards(name: str, split: str, wants: dict[str, Want]) -> Source:
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
  named = {
    x for _, _, members in places for x in members if not isinstance(members, str)
  }
  wants = {
    c: want
    for c, want in wants.items()
    if not want.optional or _may_be_there(want.field, named)
  }

  def read(indices, columns):
    records, mine = [], {c: wants[c] for c in columns}
    extensions = needed(mine)
    for i in indices:
      shard, key, members = places[i]
      try:
        if isinstance(members, str):
          raise UserError(members)
        if extensions is not None:
          members = {x: m for x, m in members.items() if x in extensions}
        record = sample_record(_content(shards[shard], members), mine)
        records.append(record | {KEY: f"{os.path.basename(shards[shard])}:{key}"})
      except (OSError, ValueError) as error:
        records.append(error)
    return records

  return Source(f"{name} {split}", len(places), tuple(wants), read)


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
