"""Folders, tables and tar shards: every record as it was written, what is bad named."""

import csv
import io
import json
import sys
import tarfile

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from clj.data import DataError, Want, open_data, open_source, shards
from tests.data_test import encode, evaluated, photograph, take

COUNT = 30
PICTURES = [photograph(12, 12, seed=i) for i in range(COUNT)]
DATA = [encode(p) for p in PICTURES]
CAPTIONS = [f"picture {i}, a \u201cquoted\u201d one" for i in range(COUNT)]
LABELS = ["cat", "ant", "bee"]


def opened(name, split="train", *, caption="caption", label=None, image=None, **kwargs):
  """A data set of pictures, labels and captions in these fields; caption None: none."""
  columns = {"image": {"size": 12} | ({"field": image} if image else {})}
  columns["label"] = {"field": label} if label else {}
  if caption is not None:
    columns["text"] = {"field": caption, "tokenizer": "words", "length": 16}
  views = {"name": "views", "size": 12, "views": 1, "crop_scale": (1, 1)}
  section = {"source": name, "train_split": split, "columns": columns}
  return open_data(section | {"augment": {"image": views}} | kwargs)


def check(split, captions=None, labels=None):
  """A split of all PICTURES: in order, with their captions and labels."""
  whole = evaluated(split)
  np.testing.assert_array_equal(whole["image"][:COUNT, 0], PICTURES)
  captions = captions or [[c] for c in CAPTIONS]
  labels = labels or [LABELS[i % 3] for i in range(COUNT)]
  names = split.classes["label"]
  records = split.records(range(COUNT))
  assert [(r["text"], names[r["label"]]) for r in records] == list(
    zip(captions, labels)
  )


def write_pictures(root):
  root.mkdir(parents=True, exist_ok=True)
  for i, data in enumerate(DATA):
    (root / f"{i:03d}.png").write_bytes(data)


def write_csv(root, delimiter=",", label=lambda i: LABELS[i % 3]):
  write_pictures(root / "pictures")
  path = root / "table.csv"
  with open(path, "w", newline="") as file:
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(["filepath", "title", "kind", "other"])
    for i, caption in enumerate(CAPTIONS):
      writer.writerow([f"pictures/{i:03d}.png", caption, label(i), "x\ny"])
  return path


FIELDS = {"image": "filepath", "label": "kind", "caption": "title"}


def add(shard, name, data, **attributes):
  member = tarfile.TarInfo(name)
  member.size = len(data)
  for key, value in attributes.items():
    setattr(member, key, value)
  shard.addfile(member, io.BytesIO(data))


def write_shards(root, count=2, mode="w", suffix="tar"):
  """As img2dataset writes them: 00000.tar with KEY.png, KEY.txt and KEY.json."""
  for s in range(count):
    with tarfile.open(root / f"{s:05d}.{suffix}", mode) as shard:
      for i in range(s * COUNT // count, (s + 1) * COUNT // count):
        described = {"caption": CAPTIONS[i], "url": "http://x", "titles": ["a", f"{i}"]}
        add(shard, f"{i:09d}.png", DATA[i])
        add(shard, f"{i:09d}.txt", CAPTIONS[i].encode())
        add(shard, f"{i:09d}.json", json.dumps(described).encode())
        add(shard, f"{i:09d}.cls", str(i % 3).encode())


# Folders.


def test_captions_beside_pictures(tmp_path):
  for i, data in enumerate(DATA):
    folder = tmp_path / sorted(LABELS)[i // 10]
    folder.mkdir(exist_ok=True)
    (folder / f"{i:03d}.png").write_bytes(data)
    said = f"{CAPTIONS[i]}\n\n  second {i} \n"
    mark = ("utf-8", "utf-8-sig", "utf-16")[i % 3]  # as Windows' editors write it
    (folder / f"{i:03d}.txt").write_bytes(said.encode(mark))
  name = f"folder:{tmp_path}"
  captions = [[c, f"second {i}"] for i, c in enumerate(CAPTIONS)]
  labels = [sorted(LABELS)[i // 10] for i in range(COUNT)]
  check(opened(name).train, captions, labels)
  assert "text" not in opened(name, caption=None).train.records([0])[0]
  (tmp_path / "ant" / "004.txt").unlink()
  data = opened(name)
  (batch,) = take(data, 1, batch_size=COUNT)
  assert 4 not in batch["index"]
  assert "004.png: it has no caption" in data.train.bad[4]
  with pytest.raises(DataError, match="no field 'title'.*it has: image, aud"):
    opened(name, caption="title")
  # Texts alone: each file is a record.
  columns = {"text": {"field": "caption", "tokenizer": "words", "length": 16}}
  texts = open_data({"source": name, "columns": columns}).train
  assert len(texts) == COUNT - 1
  assert texts.records([0])[0]["text"] == captions[0]


# Tables.


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_csv_with_paths(tmp_path, delimiter):
  path = write_csv(tmp_path, delimiter)
  check(opened(f"csv:{path}", **FIELDS).train)


@pytest.mark.parametrize("kind", ["bytes", "struct", "paths"])
def test_a_parquet_file(tmp_path, kind):
  write_pictures(tmp_path / "pictures")
  paths = [f"pictures/{i:03d}.png" for i in range(COUNT)]
  image = {
    "bytes": DATA,
    "struct": [{"bytes": d, "path": "x.png"} for d in DATA],
    "paths": [str(tmp_path / p) for p in paths],
  }[kind]
  captions = [[c, "again"] for c in CAPTIONS]
  table = {
    "image": image,
    "caption": captions,
    "label": [10 * (i % 3) for i in range(COUNT)],
  }
  table = pyarrow.table(table)
  for part in range(2):
    parquet.write_table(
      table.slice(part * 20, 20), tmp_path / f"part-{part}.parquet", row_group_size=7
    )
  name = f"parquet:{tmp_path}/part-*.parquet"
  check(opened(name).train, captions, [str(10 * (i % 3)) for i in range(COUNT)])
  with pytest.raises(DataError, match=r"too much to hold; python -m clj.data.ingest"):
    open_source(name, "train", wants={"x": Want("image", "image")}, memory_limit=1000)


def test_splits_of_a_table(tmp_path):
  train = write_csv(tmp_path)
  train.rename(tmp_path / "train.csv")
  test = write_csv(tmp_path, label=lambda i: "bee" if i else "new")
  test.rename(tmp_path / "val.csv")
  name = f"csv:{tmp_path}/{{split}}.csv"
  data = opened(name, "train[:50%]", test_split="val", **FIELDS)
  assert len(data.train) == 15
  assert data.train.classes["label"] == ("ant", "bee", "cat")
  # Numbered as in training; what training does not have is none.
  assert [r["label"] for r in data.test.records([0, 1])] == [-1, 1]
  both = opened(name, "train[10:]+val[:5]", **FIELDS)
  assert len(both.train) == 25
  with pytest.raises(DataError, match="there is no such file"):
    opened(name, "dev", **FIELDS)


def test_a_path_is_relative_to_the_table_of_its_row(tmp_path):
  for i in range(2):
    folder = tmp_path / f"{i}"
    folder.mkdir()
    (folder / "x.png").write_bytes(DATA[i])
    (folder / "table.csv").write_text("image,label\nx.png,a\n")
  split = opened(f"csv:{tmp_path}/*/table.csv", caption=None).train
  np.testing.assert_array_equal(split.picture(0), PICTURES[0])
  np.testing.assert_array_equal(split.picture(1), PICTURES[1])
  assert split.records([1])[0]["id"] == "x.png"


@pytest.mark.parametrize(
  ("values", "names", "numbers"),
  [
    (["1", "01", "", "10", "2", " "], ("01", "1", "2", "10"), [1, 0, -1, 3, 2, -1]),
    (["b", "a", "b", "", "a", "a"], ("a", "b"), [1, 0, 1, -1, 0, 0]),
  ],
)
def test_classes_of_a_csv_are_text(tmp_path, values, names, numbers):
  rows = "".join(f'x{i}.png,"{value}"\n' for i, value in enumerate(values))
  (tmp_path / "t.csv").write_text("image,label\n" + rows)
  split = opened(f"csv:{tmp_path}/t.csv", caption=None).train
  assert split.classes["label"] == names
  assert split.labels().tolist() == numbers


@pytest.mark.parametrize(
  ("values", "names", "numbers"),
  [
    ([True, False, None], ("False", "True"), [1, 0, -1]),
    ([2.0, 0.5, float("nan")], ("0.5", "2"), [1, 0, -1]),
    ([b"y", b"x", b""], ("x", "y"), [1, 0, -1]),
    ([10, 9, -1], ("-1", "9", "10"), [2, 1, 0]),
    ([10**12, 7, None], ("7", str(10**12)), [1, 0, -1]),
  ],
)
def test_classes_of_any_type(tmp_path, values, names, numbers):
  table = pyarrow.table({"image": DATA[:3], "label": values})
  parquet.write_table(table, tmp_path / "t.parquet")
  split = opened(f"parquet:{tmp_path}/t.parquet", caption=None).train
  assert split.classes["label"] == names
  assert split.labels().tolist() == numbers


@pytest.fixture
def hub(monkeypatch):
  """Stands in for the file system of Hugging Face, in memory."""
  from fsspec.implementations.memory import MemoryFileSystem

  class Hub(MemoryFileSystem):
    protocol = ("hf",)
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
      return MemoryFileSystem._strip_protocol(path.removeprefix("hf://"))

  registry = sys.modules["fsspec.registry"]._registry
  monkeypatch.setitem(registry, "hf", Hub)
  Hub.clear_instance_cache()
  return Hub()


def test_hugging_face_data_sets(hub):
  features = {
    "image": {"_type": "Image"},
    "label": {"names": ["zebra", "ant", "bee"], "_type": "ClassLabel"},
  }
  described = json.dumps({"info": {"features": features}})
  for split, rows in (("train", range(COUNT)), ("validation", range(3))):
    table = pyarrow.table(
      {
        "image": [{"bytes": DATA[i], "path": f"{i}.png"} for i in rows],
        "caption": [CAPTIONS[i] for i in rows],
        "label": [i % 3 for i in rows],
      }
    ).replace_schema_metadata({"huggingface": described})
    with hub.open(f"datasets/me/mine/data/{split}-0.parquet", "wb") as file:
      parquet.write_table(table, file)
  name = "hf://datasets/me/mine/data/{split}-*.parquet"
  data = opened(name, test_split="validation")
  check(data.train, None, [("zebra", "ant", "bee")[i % 3] for i in range(COUNT)])
  assert len(data.test) == 3
  assert data.test.labels().tolist() == [0, 1, 2]
  with pytest.raises(
    DataError, match=r"no such file as hf://datasets/me/mine/data/dev"
  ):
    opened(name, "dev")


def test_without_huggingface_hub(monkeypatch):
  import fsspec

  def missing(name):
    raise ImportError("Install huggingface_hub to access HfFileSystem")

  monkeypatch.setattr(fsspec, "filesystem", missing)
  with pytest.raises(DataError, match="is read by: pip install huggingface_hub"):
    opened("hf://datasets/me/mine/*.parquet")


def test_what_is_wrong_in_a_table(tmp_path):
  path = write_csv(tmp_path)
  lines = path.read_text().splitlines(keepends=True)
  lines[1] = lines[1].replace("pictures/000.png", "http://example.org/a.jpg")
  lines[3] = lines[3].replace("pictures/001.png", "pictures/absent.png")
  path.write_text("".join(lines))
  source = opened(f"csv:{path}", **FIELDS).train.source
  url, absent, good = source.read([0, 1, 2])
  assert "img2dataset" in str(url)
  assert "absent.png" in str(absent)
  assert good["image"] == DATA[2]
  with pytest.raises(
    DataError, match=r"no column 'image' \(data.columns.image.field\); it has"
  ):
    opened(f"csv:{path}", caption=None)
  with pytest.raises(DataError, match=r"no column 'text' \(data.columns.text.field\)"):
    opened(f"csv:{path}", **FIELDS | {"caption": "text"})
  (tmp_path / "twice.csv").write_text("image,label,label\nx.png,a,b\n")
  with pytest.raises(DataError, match=r"twice.csv has two columns 'label'"):
    opened(f"csv:{tmp_path}/twice.csv", caption=None)
  (tmp_path / "no.parquet").write_bytes(b"PAR1 not")
  with pytest.raises(DataError, match="no.parquet is no table"):
    opened(f"parquet:{tmp_path}/no.parquet", caption=None)


def test_tables_of_different_types(tmp_path):
  for name, label in (("a", [1]), ("b", [["x"]])):
    table = pyarrow.table({"image": DATA[:1], "label": label})
    parquet.write_table(table, tmp_path / f"{name}.parquet")
  with pytest.raises(DataError, match="b.parquet has columns of another type than"):
    opened(f"parquet:{tmp_path}/*.parquet", caption=None)
  # A number in one table and text in the other is the same class.
  for name, label in (("train", [1, 2, 1]), ("test", ["2", "1", None])):
    table = pyarrow.table({"image": DATA[:3], "label": label})
    parquet.write_table(table, tmp_path / f"x-{name}.parquet")
  data = opened(f"parquet:{tmp_path}/x-{{split}}.parquet", caption=None)
  assert data.train.labels().tolist() == [0, 1, 0]
  assert data.test.labels().tolist() == [1, 0, -1]


# Shards.


def test_shards_of_img2dataset(tmp_path):
  write_shards(tmp_path)
  labels = [str(i % 3) for i in range(COUNT)]
  for pattern in ("*.tar", "{00000..00001}.tar"):
    check(opened(f"webdataset:{tmp_path}/{pattern}").train, None, labels)
  name = f"webdataset:{tmp_path}/*.tar"
  titles = [["a", f"{i}"] for i in range(COUNT)]
  check(opened(name, caption="titles").train, titles, labels)
  check(opened(name, image="png", label="cls").train, None, labels)
  assert len(opened(name, "train[:10]").train) == 10
  with pytest.raises(DataError, match="there is no such file"):
    opened(f"webdataset:{tmp_path}/{{00000..00002}}.tar")


def test_large_numbers_of_classes(tmp_path):
  numbers = [10**9 + 7, 5, 10**9, 5, -1]
  with tarfile.open(tmp_path / "x.tar", "w") as shard:
    for i, number in enumerate(numbers):
      add(shard, f"{i}.png", DATA[i])
      add(shard, f"{i}.cls", f"{number}\n".encode())
  split = opened(f"webdataset:{tmp_path}/x.tar", caption=None).train
  assert split.classes["label"] == ("5", "1000000000", "1000000007")
  assert split.labels().tolist() == [2, 0, 1, 0, -1]


@pytest.mark.parametrize(
  ("members", "keys"),
  [
    (["a.b.png", "a.b.txt", "a.c.png", "a.c.txt"], ["a.b", "a.c"]),
    (["v1.0.png", "v1.1.png"], ["v1.0", "v1.1"]),
    (["a.left.png", "a.right.png", "b.left.png", "b.right.png"], ["a", "b"]),
    (["a.seg.png", "a.png", "a.txt"], ["a"]),
    (["d.1/a.png", "d.1/a.txt"], ["d.1/a"]),
  ],
)
def test_dots_in_keys(tmp_path, members, keys):
  with tarfile.open(tmp_path / "x.tar", "w") as shard:
    for name in members:
      add(shard, name, b"x")
  with tarfile.open(tmp_path / "x.tar") as shard:
    assert [sample.key for sample in shards.samples(shard)] == keys


def test_a_compressed_shard_is_not_read_at_random(tmp_path):
  write_shards(tmp_path, 1, "w:gz", "tar.gz")
  with pytest.raises(DataError, match="cannot be read at random.*clj.data.ingest"):
    opened(f"webdataset:{tmp_path}/00000.tar.gz")


def write_bad_shard(path):
  """Two good samples; around them, what must not be taken."""
  with tarfile.open(path, "w") as shard:
    add(shard, "../evil.png", DATA[0])
    add(shard, "a/../../evil.png", DATA[0])
    add(shard, "/etc/evil.png", DATA[0])
    add(shard, "link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    add(shard, "a/one.png", DATA[1])
    add(shard, "a/one.txt", b"one")
    add(shard, "alone.json", b"{}")
    add(shard, "broken.png", DATA[2][:50])
    add(shard, "broken.txt", b"broken")
    add(shard, "silent.png", DATA[2])
    add(shard, "silent.txt", b" \n")
    add(shard, "json.png", DATA[2])
    add(shard, "json.json", b"{not json")
    add(shard, "list.png", DATA[2])
    add(shard, "list.json", b"[1]")
    add(shard, "two.x.png", DATA[3])
    add(shard, "two.txt", b"two")


def test_members_that_lead_out_of_a_shard(tmp_path):
  write_bad_shard(tmp_path / "bad.tar")
  with tarfile.open(tmp_path / "bad.tar") as shard:
    found = list(shards.samples(shard))
  refused = [s.error for s in found if s.error]
  assert [("leads out" in e, "no plain file" in e) for e in refused] == [
    (True, False)
  ] * 3 + [(False, True)]
  good = [s for s in found if not s.error]
  assert [s.key for s in good] == [
    "a/one",
    "alone",
    "broken",
    "silent",
    "json",
    "list",
    "two",
  ]
  assert set(good[0].members) == {"png", "txt"}
  split = opened(f"webdataset:{tmp_path}/bad.tar").train
  records = split.records(range(len(split)))
  assert "JSON is no object" in str(records[-2])
  kept = [r["text"] for r in records if isinstance(r, dict)]
  assert kept == [["one"], [], ["broken"], [], ["two"]]
  index = evaluated(split)["index"]
  assert [records[i]["text"] for i in index if i >= 0] == [["one"], ["two"]]
  assert len(split.bad) == len(records) - 2


def test_a_shard_that_is_cut_short(tmp_path):
  write_shards(tmp_path, 1)
  path = tmp_path / "00000.tar"
  data = path.read_bytes()
  with tarfile.open(path) as shard:
    members = shard.getmembers()
  # In a header, and in the data of a picture.
  cuts = (
    (members[40].offset + 100, 10, "the rest is cut off"),
    (members[40].offset_data + 100, 11, "the rest cannot be read"),
  )
  for cut, count, said in cuts:
    path.write_bytes(data[:cut])
    with tarfile.open(path) as shard:
      *good, last = shards.samples(shard)
    assert len(good) == count
    assert said in last.error
