"""Ingest: every record once, whatever is killed; what is bad or hostile stays out."""

import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from clj.data import DataError, ingest
from tests import files_test
from tests.data_test import encode, evaluated, photograph, write_tfds
from tests.files_test import CAPTIONS, COUNT, DATA, LABELS, opened

TABLE = {"image": "filepath", "caption": "title", "label": "kind"}


def write_source(kind, root):
  """30 pictures as a folder, a table or shards; what `ingest` is asked for."""
  root.mkdir(parents=True, exist_ok=True)
  if kind == "csv":
    return f"csv:{files_test.write_csv(root)}", TABLE
  if kind == "parquet":
    import pyarrow
    from pyarrow import parquet

    labels = [LABELS[i % 3] for i in range(COUNT)]
    table = pyarrow.table({"filepath": DATA, "title": CAPTIONS, "kind": labels})
    parquet.write_table(table, root / "table.parquet", row_group_size=4)
    return f"parquet:{root}/table.parquet", TABLE
  if kind == "webdataset":
    files_test.write_shards(root, 3)
    return f"webdataset:{root}/*.tar", {}
  if kind == "one shard":
    files_test.write_shards(root, 1, "w:gz", "tar.gz")
    return f"{root}/00000.tar.gz", {}
  for i in range(COUNT):
    folder = root / LABELS[i % 3]
    folder.mkdir(exist_ok=True)
    (folder / f"{i:03d}.png").write_bytes(DATA[i])
    (folder / f"{i:03d}.txt").write_text(CAPTIONS[i])
  return str(root), {}


KINDS = ["folder", "csv", "parquet", "webdataset", "one shard"]


def records_of(out, split="train"):
  """What TFDS reads there: key -> picture, caption, class."""
  builder = tfds.builder_from_directory(str(out))
  label = builder.info.features["label"]
  return [
    (
      record["key"].decode(),
      record["image"].tobytes(),
      record["caption"].decode(),
      label.names[record["label"]],
    )
    for record in builder.as_data_source(split)
  ]


def check(out, kind):
  """Every picture once, with its caption and class, through TFDS and through clj."""
  found = records_of(out)
  pictures = {p.tobytes(): i for i, p in enumerate(files_test.PICTURES)}
  numbers = [pictures[image] for _, image, _, _ in found]
  assert sorted(numbers) == list(range(COUNT))
  assert len({key for key, *_ in found}) == COUNT
  names = LABELS if kind in ("folder", "csv", "parquet") else ["0", "1", "2"]
  for i, (_, _, caption, name) in zip(numbers, found):
    assert (caption, name) == (CAPTIONS[i], names[i % 3])
  root = pathlib.Path(out).parent
  split = opened(root.name, data_dir=str(root.parent)).train
  records = split.records(range(COUNT))
  assert [(r["id"], r["text"]) for r in records] == [
    (key, [caption]) for key, _, caption, _ in found
  ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source(tmp_path, kind):
  source, options = write_source(kind, tmp_path / "in")
  out = tmp_path / "data" / "made"
  made = ingest.ingest(source, str(out), shard_records=8, **options)
  assert made["train"] | {"source": 0, "identity": 0} == {
    "records": COUNT,
    "bad": 0,
    "reasons": [],
    "source": 0,
    "identity": 0,
  }
  check(out / "1.0.0", kind)
  shards = {"folder": 4, "csv": 4, "parquet": 4, "webdataset": 3, "one shard": 1}
  files = sorted(os.listdir(out / "1.0.0"))
  assert len([f for f in files if "array_record" in f]) == shards[kind]
  assert not [f for f in files if f.startswith(".")]
  # Again: nothing to do.
  before = {f: os.stat(out / "1.0.0" / f).st_mtime_ns for f in files}
  assert ingest.ingest(source, str(out), shard_records=8, **options) == {
    "train": json.loads((out / "1.0.0" / "ingest.json").read_text())["train"]
  }
  assert before == {f: os.stat(out / "1.0.0" / f).st_mtime_ns for f in files}


# Killed. The child is killed by SIGKILL, from within, at a chosen picture, rename or
# removal: nothing of Python is run after it.

KILLED = """
  import json, os, signal, sys
  from clj.data import ingest
  from tensorflow_datasets.proto import tf_example_generated_pb2  # loaded once

  def dying(function, at):
    count = 0
    def counted(*args):
      nonlocal count
      count += 1
      if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
      return function(*args)
    return counted

  source, out, options, where = json.loads(sys.argv[1])
  for name, at in where:
    child = os.fork()
    if child == 0:
      place, _, attribute = name.rpartition(".")
      holder = {"ingest": ingest, "os": os, "shutil": ingest.shutil}[place]
      setattr(holder, attribute, dying(getattr(holder, attribute), at))
      ingest.ingest(source, out, shard_records=8, threads=2, **options)
      os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "whole", flush=True)
"""


@pytest.mark.parametrize("kind", ["folder", "csv", "webdataset", "one shard"])
def test_killed_and_resumed(tmp_path, kind):
  source, options = write_source(kind, tmp_path / "in")
  out = tmp_path / "data" / "made"
  where = [("ingest.check_picture", at) for at in (3, 15, 14)]
  where += [("os.replace", at) for at in (1, 2, 3, 4, 5)]
  where += [("shutil.rmtree", 2)]  # in the end, when all is named already
  arguments = json.dumps([source, str(out), options, where])
  done = subprocess.run(
    [sys.executable, "-c", "\n".join(x[2:] for x in KILLED.splitlines()), arguments],
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": os.getcwd()},
    timeout=120,
  )
  ends = done.stdout.split()
  assert len(ends) == len(where), done.stderr
  assert ends[0] == str(int(signal.SIGKILL))
  assert ends.count("9") >= 5
  made = ingest.ingest(source, str(out), shard_records=8, threads=2, **options)
  assert (made["train"]["records"], made["train"]["bad"]) == (COUNT, 0)
  check(out / "1.0.0", kind)
  assert not [f for f in os.listdir(out / "1.0.0") if f.startswith(".ingest")]


def test_a_part_that_is_written_is_not_written_again(tmp_path, monkeypatch):
  source, options = write_source("csv", tmp_path / "in")
  out = tmp_path / "made"
  real, seen = ingest.check_picture, []

  def stopping(data):
    seen.append(data)
    if len(seen) > 19:  # in the next part too: it may have begun
      raise KeyboardInterrupt
    real(data)

  monkeypatch.setattr(ingest, "check_picture", stopping)
  with pytest.raises(KeyboardInterrupt):
    ingest.ingest(source, str(out), shard_records=8, threads=1, **options)
  seen.clear()
  monkeypatch.setattr(ingest, "check_picture", seen.append)
  ingest.ingest(source, str(out), shard_records=8, threads=1, **options)
  # Two parts of eight were done.
  assert len(seen) == COUNT - 16
  check(out / "1.0.0", "csv")


def test_a_source_that_changed_is_not_mixed_in(tmp_path, monkeypatch):
  source, _ = write_source("folder", tmp_path / "in")
  out = tmp_path / "made"

  def stopping(data):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(ingest, "check_picture", stopping)
    with pytest.raises(KeyboardInterrupt):
      ingest.ingest(source, str(out))
  (tmp_path / "in" / "new.png").write_bytes(DATA[0])
  with pytest.raises(
    DataError, match="not finished, of .* with other files or options"
  ):
    ingest.ingest(source, str(out))
  (tmp_path / "in" / "new.png").unlink()
  assert ingest.ingest(source, str(out))["train"]["records"] == COUNT
  with pytest.raises(
    DataError, match=r"has a split 'train' already, of .*take another"
  ):
    ingest.ingest(source, str(out), shard_records=5)


# What is bad.


def test_bad_entries_are_counted_and_left_out(tmp_path, capsys):
  root = tmp_path / "in"
  root.mkdir()
  files_test.write_bad_shard(root / "bad.tar")
  out = tmp_path / "made"
  assert ingest.main([str(root), str(out)]) == 0
  said = capsys.readouterr()
  assert "train: 2 records, 9 bad" in said.out
  for reason in (
    "refused: '../evil.png' leads out of the archive",
    "refused: 'a/../../evil.png' leads out",
    "refused: '/etc/evil.png' leads out",
    "refused: 'link.png' is no plain file",
    "alone: it has no picture",
    "broken: ",
    "silent: it has no caption",
    "json: ",
    "list: its JSON is no object",
  ):
    assert reason in said.out
  assert "2 records, 9 bad, part 1 of 1" in said.err
  builder = tfds.builder_from_directory(str(out / "1.0.0"))
  keys = [r["key"].decode() for r in builder.as_data_source("train")]
  assert keys == ["a/one", "two"]


def test_a_shard_that_is_cut_short_keeps_what_is_whole(tmp_path):
  root = tmp_path / "in"
  root.mkdir()
  files_test.write_shards(root, 2)
  path = root / "00001.tar"
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  (root / "00002.tar").write_bytes(b"no tar at all")
  made = ingest.ingest(str(root), str(tmp_path / "made"))["train"]
  assert COUNT // 2 < made["records"] < COUNT
  assert 2 <= made["bad"] <= 3
  assert "the rest" in " ".join(made["reasons"])
  assert "00002.tar cannot be read" in made["reasons"][-1]


def bomb(width, height):
  """A PNG of a few kilobytes that would decode to `width * height` pixels."""

  def chunk(kind, data):
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

  head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
  rows = zlib.compress(bytes((width // 8 + 2) * height), 9)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", head)
    + chunk(b"IDAT", rows)
    + chunk(b"IEND", b"")
  )


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
  from clj.data import images

  decoded = []
  real = images.decode
  monkeypatch.setattr(images, "decode", lambda d: decoded.append(d) or real(d))
  for side, data in {7100: bomb(7100, 7100), 30_000: bomb(30_000, 30_000)}.items():
    with pytest.raises(ValueError, match="refused: .*over 50 megapixels"):
      ingest.check_picture(data)
    assert len(data) < side * side // 500
  assert not decoded
  ingest.check_picture(bomb(800, 600))
  assert len(decoded) == 1
  root = tmp_path / "in"
  root.mkdir()
  (root / "bomb.png").write_bytes(bomb(7100, 7100))
  (root / "good.png").write_bytes(DATA[0])
  (root / "text.png").write_bytes(b"no picture")
  made = ingest.ingest(str(root), str(tmp_path / "made"))["train"]
  assert (made["records"], made["bad"]) == (1, 2)
  assert made["reasons"][0].startswith("bomb.png: refused: 7100 x 7100 pixels")


def test_nothing_good_is_an_error(tmp_path):
  root = tmp_path / "in"
  root.mkdir()
  (root / "text.png").write_bytes(b"no picture")
  with pytest.raises(DataError, match="no record is good, 1 are bad: text.png"):
    ingest.ingest(str(root), str(tmp_path / "made"))


@pytest.mark.parametrize(
  ("source", "out", "said"),
  [
    ("absent", "made", "there is no folder 'absent'; SOURCE is"),
    ("csv:absent.csv", "made", "there is no such file"),
    ("folder:.", "my-set", "'my-set', the last of OUT, cannot be the name"),
    ("folder:.", "gs://bucket/made", "is no local directory"),
  ],
)
def test_what_cannot_be_done(tmp_path, monkeypatch, capsys, source, out, said):
  monkeypatch.chdir(tmp_path)
  assert ingest.main([source, out]) == 1
  error = capsys.readouterr().err
  assert said in error
  assert error.count("\n") == 1


# Splits, captions and classes.


def test_splits(tmp_path):
  for split, numbers in {"train": range(20), "val": range(20, 30)}.items():
    for i in numbers:
      folder = tmp_path / "in" / split / LABELS[i % 3]
      folder.mkdir(parents=True, exist_ok=True)
      (folder / f"{i}.png").write_bytes(DATA[i])
  made = ingest.ingest(str(tmp_path / "in"), str(tmp_path / "a_folder"))
  assert {k: v["records"] for k, v in made.items()} == {"train": 20, "test": 10}
  # One after the other, the classes as in the first.
  for name, label in (("train", lambda i: LABELS[i % 3]), ("test", lambda i: "cat")):
    files_test.write_csv(tmp_path, label=label).rename(tmp_path / f"{name}.csv")
  out = str(tmp_path / "tables" / "2.0.0")
  source = f"csv:{tmp_path}/{{split}}.csv"
  ingest.ingest(source, out, splits=["train"], **TABLE)
  ingest.ingest(source, out, splits=["test"], **TABLE)
  both = opened("tables", data_dir=str(tmp_path))
  assert (
    both.train.classes["label"] == both.test.classes["label"] == ("ant", "bee", "cat")
  )
  assert set(both.test.labels()) == {2}
  again = ingest.ingest(source, str(tmp_path / "b"), splits=["train", "test"], **TABLE)
  assert list(again) == ["train", "test"]
  with pytest.raises(DataError, match="so it is one split, not train, test"):
    name = f"csv:{tmp_path}/train.csv"
    ingest.ingest(name, str(tmp_path / "c"), splits=["train", "test"], **TABLE)
  with pytest.raises(DataError, match="has a split with another features.json"):
    options = TABLE | {"caption": ""}
    ingest.ingest(f"csv:{tmp_path}/train.csv", out, splits=["more"], **options)


def test_several_captions(tmp_path):
  source, _ = write_source("webdataset", tmp_path / "in")
  out = tmp_path / "made"
  ingest.ingest(source, str(out), caption="titles")
  made = opened("made", data_dir=str(tmp_path)).train
  said = [r["text"] for r in made.records(range(COUNT))]
  assert said == [["a", f"{i}"] for i in range(COUNT)]


def test_numbers_that_are_no_classes(tmp_path):
  (tmp_path / "in").mkdir()
  numbers = [10**9, 3, -1, 10**9 + 1, 3]
  with tarfile.open(tmp_path / "in" / "x.tar", "w") as shard:
    for i, number in enumerate(numbers):
      files_test.add(shard, f"{i}.png", DATA[i])
      files_test.add(shard, f"{i}.cls", str(number).encode())
  source = f"webdataset:{tmp_path}/in/x.tar"
  ingest.ingest(source, str(tmp_path / "made"), caption="")
  made = opened("made", caption=None, data_dir=str(tmp_path)).train
  assert made.classes["label"] == ("3", str(10**9), str(10**9 + 1))
  assert made.labels().tolist() == [1, 0, -1, 2, 0]


# TFRecord, as TFDS writes it with TensorFlow.


def masked_crc32c(data):
  """CRC-32C (Castagnoli) by its definition, bit by bit, masked as TFRecord has it."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
  crc ^= 0xFFFFFFFF
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(record):
  length = struct.pack("<Q", len(record))
  return b"".join(
    [
      length,
      struct.pack("<I", masked_crc32c(length)),
      record,
      struct.pack("<I", masked_crc32c(record)),
    ]
  )


def write_tfrecord(root, pictures):
  """A TFDS directory in TFRecord format; its file, and the place of each record."""
  made = write_tfds(root / "array", pictures)
  reader = ArrayRecordReader(str(made))
  examples = reader.read([*range(len(pictures))])
  reader.close()
  file = write_tfds(root, pictures, "tfrecord")
  frames = [frame(example) for example in examples]
  file.write_bytes(b"".join(frames))
  return file, np.cumsum([0, *map(len, frames)]), examples


def test_tfrecord_becomes_arrayrecord(tmp_path):
  pictures = [encode(photograph(12, 12, seed=i)) for i in range(12)]
  file, _, examples = write_tfrecord(tmp_path, pictures)
  with pytest.raises(DataError, match="clj.data.ingest"):
    opened("tiny", caption=None, data_dir=str(tmp_path))
  for source in (file.parent, file.parent.parent):
    out = tmp_path / "out" / source.name / "tiny"
    made = ingest.ingest(str(source), str(out))
    assert (made["train"]["records"], made["train"]["bad"]) == (12, 0)
    made = opened("tiny:1.0.0", caption=None, data_dir=str(out.parent)).train
    assert made.classes["label"] == ("x", "y", "z")
    batch = evaluated(made, 12)
    np.testing.assert_array_equal(batch["label"], np.arange(12) % 3)
    np.testing.assert_array_equal(
      batch["image"][:, 0], [photograph(12, 12, seed=i) for i in range(12)]
    )
  # The examples are the same bytes.
  builder = tfds.builder_from_directory(str(out / "1.0.0"))
  raw = builder.as_data_source(
    "train", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
  )
  assert [bytes(raw[i]) for i in range(12)] == examples
  with pytest.raises(DataError, match="in array_record format: only tfrecord"):
    ingest.ingest(str(out / "1.0.0"), str(tmp_path / "again"))


def test_damaged_tfrecords(tmp_path):
  pictures = [encode(photograph(12, 12, seed=i)) for i in range(12)]
  pictures[5] = b"no picture"
  file, places, _ = write_tfrecord(tmp_path, pictures)
  data = bytearray(file.read_bytes())
  data[places[2] + 40] ^= 1  # in the data of a record
  data[places[9] + 3] ^= 1  # in a length: where the rest begins is lost
  file.write_bytes(data)
  made = ingest.ingest(str(file.parent), str(tmp_path / "out" / "tiny"))["train"]
  assert made["records"] == 7
  assert made["bad"] == 5
  said = " | ".join(made["reasons"])
  assert ":2: the checksum is wrong" in said
  assert ":5: " in said
  assert ":9: the length is damaged" in said
  assert ":11: lost" in said
  kept = opened("tiny", caption=None, data_dir=str(tmp_path / "out")).train
  np.testing.assert_array_equal(kept.labels(), np.array([0, 1, 3, 4, 6, 7, 8]) % 3)
