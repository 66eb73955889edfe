"""Pictures, captions and labels into a TFDS directory that is read at random.

    python -m clj.data.ingest SOURCE OUT [--split=train] [--caption=caption] ...

SOURCE is a folder, a table or tar shards, named as in `clj.data.files` or by their path
alone, or a TFDS directory in TFRecord format. OUT is DATA_DIR/NAME; afterwards
`data.source=NAME` with `data.data_dir=DATA_DIR` reads it, as TFDS does.

The work is split into parts, each of which becomes a shard: written beside, put on the
disk, renamed, and only then noted down. A killed run is started again with the same
command and leaves out what is noted. Every picture is decoded on the way; what is
broken is counted and left out.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import struct
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from clj.cli import UserError
from clj.data import files, images, shards, tables
from clj.data.columns import class_text, distinct, strings
from clj.data.source import DataError, Want, first_line
from clj.runs import whole

MAX_PIXELS = images.MAX_PIXELS
_REASONS = 100  # that are kept of a part
_CLASSES = 1 << 17  # no class has a greater number
_VERSION = re.compile(r"\d+\.\d+\.\d+$")


class Entry(NamedTuple):
  """A record to be written: a serialised tf.train.Example, and what is in it."""

  example: bytes
  captions: int = 0
  label: int = -1


class Part(NamedTuple):
  """What becomes a shard. records: gives entries, an exception for each bad record."""

  split: str
  records: Callable[[], Iterator[Entry | Exception]]


class Plan(NamedTuple):
  """All there is to do.

  name, version: of the data set. identity: changes where the work does. parts: in
  order. class_names: of the labels, or None. features: the TFDS directory whose
  description holds here too, or None.
  """

  name: str
  version: str
  identity: str
  parts: list[Part]
  class_names: tuple[str, ...] | None = None
  features: str | None = None


def ingest(
  source: str,
  out: str,
  *,
  splits: Sequence[str] = ("train",),
  image: str = "image",
  caption: str | None = None,
  label: str = "label",
  shard_records: int = 4096,
  threads: int | None = None,
) -> dict:
  """Writes a prepared TFDS directory; goes on where an earlier run was killed.

  Args:
    source, out: see the module.
    splits: to make of a source whose path has `{split}`, or the one that it is; folders
      and TFDS directories know their own.
    image, caption, label: columns, or fields of a shard's descriptions. caption None:
      "caption", where there are any; "": without.
    shard_records: of a shard of a folder or a table; tar shards and TFRecord files
      become one each.
    threads: parts at a time; None: one a processor.

  Returns:
    {split: {"records", "bad", "reasons"}}.

  Raises:
    DataError: one line; nothing to read, or OUT holds something else.
  """
  if "://" in out:
    raise DataError(f"{out} is no local directory: write one, and copy it there")
  source, fields = _named(source), {"image": image, "caption": caption, "label": label}
  out = os.path.abspath(os.path.expanduser(out))
  version = os.path.basename(out) if _VERSION.match(os.path.basename(out)) else None
  root = os.path.dirname(out) if version else out
  if ":" not in source or "://" in source:
    plan = _tfrecord_plan(source)
    out = os.path.join(root, version or plan.version)
  else:
    out = os.path.join(root, version or "1.0.0")
    known = _read_lines(os.path.join(out, "label.labels.txt"))
    name = os.path.basename(root)
    if not re.fullmatch(r"[A-Za-z]\w*", name):
      raise DataError(f"{name!r}, the last of OUT, cannot be the name of a data set")
    plan = _plan(source, fields, splits, shard_records, known)
    plan = plan._replace(name=name, version=os.path.basename(out))
  made = _read_json(os.path.join(out, "ingest.json"), {})
  work = os.path.join(out, ".ingest")
  shutil.rmtree(work + ".done", ignore_errors=True)
  wanted = list(dict.fromkeys(part.split for part in plan.parts))
  if there := [s for s in wanted if s in made]:
    if all(made.get(s, {}).get("identity") == plan.identity for s in wanted):
      noted = _read_json(os.path.join(work, "plan.json"), {})
      if noted.get("identity") == plan.identity:  # killed when all but this was done
        _remove(work)
      return {s: made[s] for s in wanted}
    raise DataError(
      f"{out} has a split {there[0]!r} already, of {made[there[0]]['source']}; take"
      " another OUT, or another --split"
    )
  os.makedirs(work, exist_ok=True)
  with open(os.path.join(work, "lock"), "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      raise DataError(f"another ingest is at work in {out}") from None
    noted = _read_json(os.path.join(work, "plan.json"), None)
    if noted is None:
      noted = {"source": source, "identity": plan.identity, "parts": len(plan.parts)}
      whole.write(os.path.join(work, "plan.json"), json.dumps(noted).encode())
    if noted["identity"] != plan.identity:
      raise DataError(
        f"{work} is of an ingest that was not finished, of {noted['source']} with other"
        " files or options; finish it, or remove it to start anew"
      )
    done = _work(plan, out, work, threads or os.cpu_count())
    return _finish(plan, out, work, done, source, made)


def _named(source):
  """Puts the kind before a bare path; of a TFDS directory gives that of its version."""
  if re.match(r"(folder|csv|parquet|webdataset):", source):
    return source
  if "://" in source:
    return source.rstrip("/")
  path = os.path.abspath(os.path.expanduser(source))
  ends = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".tar": "webdataset"}
  for end, kind in ends.items():
    if path.endswith(end) or (kind == "webdataset" and re.search(r"\.tar\.\w+$", path)):
      return f"{kind}:{path}"
  if not os.path.isdir(path):
    raise DataError(
      f"there is no folder {source!r}; SOURCE is a folder, csv:PATH, parquet:PATH,"
      " webdataset:PATH or a TFDS directory"
    )
  inside = sorted(os.listdir(path))
  if "dataset_info.json" in inside:
    return path
  versions = [x for x in inside if _VERSION.match(x)]
  versions = [
    x for x in versions if os.path.isfile(os.path.join(path, x, "dataset_info.json"))
  ]
  if len(versions) > 1:
    raise DataError(f"{source} has versions {', '.join(versions)}: name one of them")
  if versions:
    return os.path.join(path, versions[0])
  if any(x.endswith(".tar") for x in inside):
    return f"webdataset:{path}/*.tar"
  return f"folder:{path}"


# What there is to do.


def _plan(source, fields, splits, shard_records, known) -> Plan:
  kind = source.partition(":")[0]
  parts, identity, class_names = [], [], known
  if kind == "folder":
    root = os.path.expanduser(source.removeprefix("folder:"))
    if os.path.isdir(root):
      splits = [s for s in files.folder_splits(root) if s in ("train", "test")]
  for split in splits:
    if kind == "folder":
      plain = files.open_folder(source, split, _wants(fields | {"caption": ""}))
      said = fields["caption"]
      if said is None:
        beside = (os.path.splitext(path)[0] + ".txt" for path in plain.files)
        said = "caption" if any(map(os.path.isfile, beside)) else ""
      made = files.open_folder(source, split, _wants(fields | {"caption": said}))
      class_names = made.class_names.get("label")
      keys = [os.path.relpath(path, root) for path in made.files]
      identity += keys
      parts += _ranges(split, made, keys, shard_records)
      continue
    if len(splits) > 1 and "{split}" not in source:
      raise DataError(
        f"{source} has no {{split}} in it, so it is one split, not {', '.join(splits)}"
      )
    (paths,) = files.resolve(source, split).values()
    identity += [(p, os.path.getsize(p), os.stat(p).st_mtime_ns) for p in paths]
    if kind == "webdataset":
      said = "caption" if fields["caption"] is None else fields["caption"]
      wants = _wants(fields | {"caption": said})
      parts += [
        Part(split, functools.partial(_shard_records, path, wants)) for path in paths
      ]
    else:
      said = _table_caption(kind, paths[0], fields)
      wants = _wants(fields | {"caption": said})
      class_names = class_names or _classes(kind, paths, wants)
      parts += _table_parts(kind, paths, wants, class_names, shard_records, split)
  identity = _digest([source, fields, list(splits), shard_records, identity])
  return Plan("", "", identity, parts, class_names)


def _wants(fields) -> dict[str, Want]:
  """What is read of a source; fields: "" for what is left out."""
  kinds = {"image": "image", "caption": "text", "label": "label"}
  return {
    name: Want(field, kinds[name], (name, field) == ("label", "label"), f"--{name}")
    for name, field in fields.items()
    if field
  }


def _digest(value):
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _ranges(split, source, keys, shard_records):
  number = _numbers(source.class_names.get("label"))

  def records(start):
    stop = min(start + shard_records, len(source))
    for at in range(start, stop, 64):
      block = range(at, min(at + 64, stop))
      for i, record in zip(block, source.read(block)):
        yield _entry(record, keys[i], number)

  starts = range(0, len(source), shard_records)
  return [Part(split, functools.partial(records, start)) for start in starts]


def _numbers(class_names) -> Callable:
  """Label as it was read -> class; names None: it is a number already."""
  known = None if class_names is None else {x: i for i, x in enumerate(class_names)}

  def number(value):
    name = class_text(value)
    if known is not None:
      return known.get(name, -1)
    if name is not None and not re.fullmatch(r"-?\d{1,18}", name):
      raise UserError(f"its label {name!r} is no number")
    return -1 if name is None else max(-1, int(name))

  return number


def _table_caption(kind, path, fields):
  """The column of captions: what was asked for, or "caption" if there is one."""
  if fields["caption"] is not None:
    return fields["caption"]
  return "caption" if "caption" in tables.column_names(kind, path) else ""


def _classes(kind, paths, wants):
  table = tables.read_table(kind, paths, {"label": wants["label"]})
  if wants["label"].field not in table.column_names:
    return ()
  return distinct(table[wants["label"].field].unique().to_pylist())


def _table_parts(kind, paths, wants, class_names, shard_records, split):
  number, parts = _numbers(class_names), []

  def records(path, table, start):
    there = {c: want for c, want in wants.items() if want.field in table.column_names}
    read = tables.rows(table, there)
    for i in range(table.num_rows):
      key = f"{os.path.basename(path)}:{start + i}"
      yield _entry(read([i], tuple(there))[0], key, number)

  def row_groups(path, groups, start):
    for table in tables.read_groups(path, groups, wants):
      yield from records(path, table, start)
      start += table.num_rows

  for path in paths:
    if kind == "csv":
      table = tables.read_table(kind, [path], wants).combine_chunks()
      for start in range(0, table.num_rows, shard_records):
        rows = table.slice(start, shard_records)
        parts.append(Part(split, functools.partial(records, path, rows, start)))
      continue
    for groups, start in tables.row_groups(path, shard_records):
      parts.append(Part(split, functools.partial(row_groups, path, groups, start)))
  return parts


def _shard_records(path, wants):
  number = _numbers(None)
  try:
    with tarfile.open(path, "r:*") as shard:
      for sample in shards.samples(shard):
        try:
          if sample.error:
            raise UserError(sample.error)
          content = {x: shard.extractfile(m).read() for x, m in sample.members.items()}
          record = shards.sample_record(content, wants)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
          record = error
        yield _entry(record, sample.key or os.path.basename(path), number)
  except (tarfile.TarError, OSError) as error:
    yield ValueError(f"{path} cannot be read ({first_line(error)})")


def _entry(record, key, number) -> Entry | Exception:
  """A record as `Source.read` gives it -> what is written, or what is wrong with it."""
  try:
    if isinstance(record, Exception):
      raise record
    if not record["image"]:
      raise UserError("it has no picture")
    check_picture(record["image"])
    captions = strings(record["caption"]) if "caption" in record else None
    if captions is not None and not captions:
      raise UserError("it has no caption")
    label = number(record.get("label"))
  except Exception as error:
    return ValueError(f"{key}: {first_line(error)}")
  from tensorflow_datasets.proto import tf_example_generated_pb2 as proto

  example = proto.Example()
  feature = example.features.feature
  feature["image"].bytes_list.value.append(record["image"])
  feature["key"].bytes_list.value.append(key.encode(errors="replace"))
  if captions is not None:
    feature["caption"].bytes_list.value.extend(c.encode() for c in captions)
  feature["label"].int64_list.value.append(label)
  data = example.SerializeToString(deterministic=True)
  return Entry(data, len(captions or ()), label)


def check_picture(data: bytes) -> None:
  """Decodes a picture.

  Raises:
    ValueError: it is broken, or has more than 50 megapixels (it is not decoded then).
  """
  try:
    with Image.open(io.BytesIO(data)) as image:
      width, height = image.size
  except Image.DecompressionBombError:
    raise UserError("refused: over 50 megapixels") from None
  except Exception:
    width = height = 0  # OpenCV may know it; what nobody knows, `decode` explains
  if width * height > MAX_PIXELS:
    raise UserError(f"refused: {width} x {height} pixels, over 50 megapixels")
  images.decode(data)


# TFDS directories in TFRecord format.


def _tfrecord_plan(source) -> Plan:
  import tensorflow_datasets as tfds

  try:
    info = tfds.builder_from_directory(source).info
  except Exception as error:
    raise DataError(f"{source} is no TFDS directory ({first_line(error)})") from None
  if info.file_format is not tfds.core.FileFormat.TFRECORD:
    raise DataError(
      f"{source} is in {info.file_format.value} format: only tfrecord needs converting"
    )
  pictures = {
    key: feature
    for key, feature in dict(info.features).items()
    if isinstance(feature, tfds.features.Image)
  }
  features = tfds.features.FeaturesDict(pictures)
  skip = {key: tfds.decode.SkipDecoding() for key in pictures}

  def check(example):
    if pictures:
      for picture in features.deserialize_example_np(example, decoders=skip).values():
        check_picture(picture)

  if importlib.util.find_spec("crc32c") is None:
    print(
      "checksums are computed in Python, about 2 MB a second;"
      " pip install crc32c makes that quick",
      file=sys.stderr,
    )
  parts, identity = [], [source]
  for name, split in info.splits.items():
    for path, count in zip(split.filepaths, split.shard_lengths):
      path = epath.Path(path)
      if not path.exists():
        raise DataError(f"{source} lacks the file {path.name}")
      identity.append((os.fspath(path), path.stat().length))
      parts.append(Part(name, functools.partial(_examples, path, count, check)))
  return Plan(info.name, str(info.version), _digest(identity), parts, None, source)


def _examples(path, count, check):
  """The examples of a TFRecord file, which should be `count`."""
  from tensorflow_datasets.proto import tf_example_generated_pb2 as proto

  found, name = 0, path.name
  for record in read_tfrecord(path):
    found += 1
    try:
      if isinstance(record, Exception):
        raise record
      proto.Example.FromString(record)
      check(record)
      yield Entry(record)
    except Exception as error:
      yield ValueError(f"{name}:{found - 1}: {first_line(error)}")
  for missing in range(found, count):
    yield ValueError(f"{name}:{missing}: lost, the file is broken before it")


def read_tfrecord(path: epath.Path) -> Iterator[bytes | Exception]:
  """The records of a TFRecord file, an exception for one whose checksum is wrong.

  A record is its length (uint64) and the masked CRC-32C of that (uint32), the data and
  the masked CRC-32C of it. After a damaged length nothing can be found.
  """
  # In C where the package crc32c is installed, else a table in Python.
  from tensorboardX.record_writer import masked_crc32c

  with path.open("rb") as file:
    while head := file.read(12):
      if len(head) < 12 or masked_crc32c(head[:8]) != struct.unpack("<I", head[8:])[0]:
        yield ValueError("the length is damaged, and with it the rest of the file")
        return
      data = file.read(struct.unpack("<Q", head[:8])[0])
      tail = file.read(4)
      if len(tail) < 4:
        yield ValueError("the file is cut short")
        return
      wrong = masked_crc32c(data) != struct.unpack("<I", tail)[0]
      yield ValueError("the checksum is wrong") if wrong else data


# Doing it.


def _work(plan, out, work, threads) -> list[dict]:
  """Writes the parts that are not yet; returns what is noted of each."""
  parts = plan.parts
  notes = [os.path.join(work, f"{i:05d}.json") for i in range(len(parts))]
  done = [_read_json(note, None) for note in notes]
  todo = [i for i, note in enumerate(done) if note is None]
  progress = _Progress(done)
  stop = threading.Event()

  def write(i):
    path = os.path.join(work, f"{i:05d}.array_record")
    note = _write_part(parts[i], path, progress, stop)
    if note is not None:
      whole.write(notes[i], json.dumps(note).encode())
      done[i] = note
      progress.part()

  try:
    with futures.ThreadPoolExecutor(threads) as pool:
      try:
        running = [pool.submit(write, i) for i in todo]
        for future in futures.as_completed(running):
          future.result()
      except BaseException:
        stop.set()
        pool.shutdown(cancel_futures=True)
        raise
  finally:
    progress.close()
  return done


def _write_part(part, path, progress, stop):
  from array_record.python.array_record_module import ArrayRecordWriter

  note = {"records": 0, "bytes": 0, "bad": 0, "captions": 0, "label": -1, "reasons": []}
  partial = path + ".partial"
  with contextlib.suppress(FileNotFoundError):
    os.remove(partial)
  writer = ArrayRecordWriter(partial, "group_size:1")
  for entry in part.records():
    if stop.is_set():
      writer.close()
      return None
    if isinstance(entry, Exception):
      note["bad"] += 1
      note["reasons"] = [*note["reasons"], str(entry)][:_REASONS]
      progress.record(bad=True)
      continue
    writer.write(entry.example)
    note["records"] += 1
    note["bytes"] += len(entry.example)
    note["captions"] = max(note["captions"], entry.captions)
    note["label"] = max(note["label"], entry.label)
    progress.record()
  writer.close()
  with open(partial, "rb") as file:
    os.fsync(file.fileno())
  os.replace(partial, path)
  return note


class _Progress:
  """A line now and then: records, records a second, parts."""

  def __init__(self, notes):
    done = [note for note in notes if note]
    self._parts, self._of = len(done), len(notes)
    self._records = sum(note["records"] for note in done)
    self._bad = sum(note["bad"] for note in done)
    self._first, self._began = self._records + self._bad, time.monotonic()
    self._lock, self._said = threading.Lock(), self._began
    self._tty = sys.stderr.isatty()

  def record(self, bad=False):
    with self._lock:
      self._records += not bad
      self._bad += bad
      if time.monotonic() - self._said > (0.2 if self._tty else 10):
        self._say()

  def part(self):
    with self._lock:
      self._parts += 1

  def close(self):
    with self._lock:
      self._say()
      if self._tty:
        print(file=sys.stderr)

  def _say(self):
    self._said = now = time.monotonic()
    rate = (self._records + self._bad - self._first) / max(now - self._began, 1e-9)
    line = (
      f"{self._records} records, {self._bad} bad, part {self._parts} of {self._of},"
      f" {rate:.0f} records a second"
    )
    start, end = ("\r", " ") if self._tty else ("", "\n")
    print(start + line, end=end, file=sys.stderr, flush=True)


def _finish(plan, out, work, done, source, made) -> dict:
  """Gives the shards their names, and writes what describes them, the list last."""
  result, splits = {}, []
  for split in dict.fromkeys(part.split for part in plan.parts):
    mine = [i for i, part in enumerate(plan.parts) if part.split == split]
    bad = sum(done[i]["bad"] for i in mine)
    reasons = [r for i in mine for r in done[i]["reasons"]][:_REASONS]
    full = [i for i in mine if done[i]["records"]]
    if not full:
      _remove(work)
      raise DataError(
        f"{source} {split}: no record is good, {bad} are bad: {reasons[0]}"
      )
    for new, old in enumerate(full):
      shard = f"{plan.name}-{split}.array_record-{new:05d}-of-{len(full):05d}"
      shard = os.path.join(out, shard)
      with contextlib.suppress(FileNotFoundError):  # killed after this: it is there
        os.replace(os.path.join(work, f"{old:05d}.array_record"), shard)
      if not os.path.isfile(shard):
        raise DataError(f"{shard} is gone; remove {work} to start anew")
    splits.append(
      {
        "name": split,
        "shardLengths": [str(done[i]["records"]) for i in full],
        "numBytes": str(sum(done[i]["bytes"] for i in full)),
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
      }
    )
    result[split] = {
      "records": sum(done[i]["records"] for i in full),
      "bad": bad,
      "reasons": reasons,
    }
  path = os.path.join(out, "dataset_info.json")
  info = _read_json(path, None)
  if plan.features is not None:
    described = _copy_description(plan.features, out)
    info = described | {"fileFormat": "array_record"}
    info.pop("alternativeFileFormats", None)
  else:
    _write_features(plan, out, work, done, info is not None)
    info = info or {
      "name": plan.name,
      "version": plan.version,
      "fileFormat": "array_record",
      "splits": [],
    }
  names = {split["name"] for split in splits}
  kept = [s for s in info["splits"] if s["name"] not in names and not plan.features]
  whole.write(path, json.dumps(info | {"splits": kept + splits}, indent=1).encode())
  noted = {
    split: {"source": source, "identity": plan.identity, **counts}
    for split, counts in result.items()
  }
  whole.write(
    os.path.join(out, "ingest.json"), json.dumps(made | noted, indent=1).encode()
  )
  _remove(work)
  return result


def _remove(work):
  """At once: half a list of parts would be taken for that of another ingest."""
  os.replace(work, work + ".done")
  shutil.rmtree(work + ".done")


def _copy_description(source, out):
  """What describes a TFDS directory, but the list of its files; that is returned."""
  for path in epath.Path(source).iterdir():
    told = path.name == "dataset_info.json" or ".tfrecord" in path.name
    if not told and path.is_file():
      (epath.Path(out) / path.name).write_bytes(path.read_bytes())
  return json.loads((epath.Path(source) / "dataset_info.json").read_text())


def _write_features(plan, out, work, done, there):
  """features.json; where another split has it already, it must hold for this one."""
  import tensorflow_datasets as tfds

  several = max(note["captions"] for note in done)
  label = max(note["label"] for note in done)
  features = {"image": tfds.features.Image(), "key": tfds.features.Text()}
  if several:
    old = dict(tfds.features.FeaturesDict.from_config(out)) if there else {}
    many = several > 1 or isinstance(old.get("caption"), tfds.features.Sequence)
    text = tfds.features.Text()
    features["caption"] = tfds.features.Sequence(text) if many else text
  if label >= 0:
    names = plan.class_names or tuple(map(str, range(min(label, _CLASSES) + 1)))
    features["label"] = tfds.features.ClassLabel(names=names)
  if label >= _CLASSES:  # numbers of something else: reading numbers the distinct ones
    features["label"] = tfds.features.Scalar(dtype=np.int64)
  new = os.path.join(work, "features")
  os.makedirs(new, exist_ok=True)
  tfds.features.FeaturesDict(features).save_config(new)
  for name in sorted(os.listdir(new)):
    path = os.path.join(new, name)
    if not there:
      shutil.copyfile(path, os.path.join(out, name))
    elif not _equal(path, os.path.join(out, name)):
      raise DataError(
        f"{out} has a split with another {name}: the fields and classes of all splits"
        " must be the same; take another OUT"
      )


def _equal(path, other):
  if not os.path.isfile(other):
    return False
  with open(path, "rb") as a, open(other, "rb") as b:
    return a.read() == b.read()


def _read_json(path, missing):
  try:
    with open(path) as file:
      return json.load(file)
  except FileNotFoundError:
    return missing


def _read_lines(path):
  try:
    with open(path) as file:
      return tuple(file.read().splitlines())
  except FileNotFoundError:
    return None


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m clj.data.ingest",
    description="Turns SOURCE into a TFDS directory that is read at random.",
  )
  parser.add_argument(
    "source",
    help="folder:PATH, csv:PATH, parquet:PATH, webdataset:PATH (these may have * and"
    " {split}), or a TFDS directory in TFRecord format",
  )
  parser.add_argument("out", help="DATA_DIR/NAME, or DATA_DIR/NAME/VERSION")
  parser.add_argument("--split", default="train", help="one, or several: train,test")
  parser.add_argument("--image", default="image", help="column of the picture")
  parser.add_argument("--caption", help='column of the captions; "": none')
  parser.add_argument("--label", default="label", help="column of the class")
  parser.add_argument("--shard_records", type=int, default=4096)
  parser.add_argument("--threads", type=int)
  arguments = parser.parse_args(argv)
  try:
    made = ingest(
      arguments.source,
      arguments.out,
      splits=arguments.split.split(","),
      image=arguments.image,
      caption=arguments.caption,
      label=arguments.label,
      shard_records=arguments.shard_records,
      threads=arguments.threads,
    )
  except (DataError, OSError) as error:
    print(f"clj: {first_line(error)}", file=sys.stderr)
    return 1
  for split, counts in made.items():
    print(f"{split}: {counts['records']} records, {counts['bad']} bad")
    for reason in counts["reasons"][:10]:
      print(f"  {reason}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
