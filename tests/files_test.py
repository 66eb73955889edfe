"""Folders, tables and tar shards: every record as it was written, what is bad named."""

import csv
import io
import json
import tarfile

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from clj.data import DataError, files, open_source, pipeline, sources, text
from tests.captions_test import WHOLE
from tests.data_test import encode, joined, photograph

COUNT = 30
PICTURES = [photograph(12, 12, seed=i) for i in range(COUNT)]
DATA = [encode(p) for p in PICTURES]
CAPTIONS = [f"picture {i}, a \u201cquoted\u201d one" for i in range(COUNT)]
LABELS = ["cat", "ant", "bee"]


def captions_and_labels(source):
  records = source.read(range(len(source)))
  names = source.class_names
  return [(r["caption"], names[r["label"]] if names else None) for r in records]


def check(source, captions=None, labels=None):
  """A source of all PICTURES: in order, with their captions and labels."""
  whole = joined(list(pipeline.eval_batches(source, batch_size=16, size=12)))
  np.testing.assert_array_equal(whole["image"][:COUNT, 0], PICTURES)
  captions = captions or [[c] for c in CAPTIONS]
  labels = labels or [LABELS[i % 3] for i in range(COUNT)]
  assert captions_and_labels(source) == list(zip(captions, labels))


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


FIELDS = {"image": "filepath", "label": "kind"}


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
    (folder / f"{i:03d}.txt").write_text(f"{CAPTIONS[i]}\n\n  second {i} \n")
  source = open_source(f"folder:{tmp_path}", "train", caption="caption")
  captions = [[c, f"second {i}"] for i, c in enumerate(CAPTIONS)]
  check(source, captions, [sorted(LABELS)[i // 10] for i in range(COUNT)])
  assert not open_source(f"folder:{tmp_path}", "train").captioned
  (tmp_path / "ant" / "004.txt").unlink()
  tokenizer = text.open_tokenizer("words", length=8, captions=lambda: CAPTIONS)
  source = sources.tokenized(source, tokenizer)
  arguments = {"seed": 0, "batch_size": COUNT, **WHOLE}
  batch = next(pipeline.batches(source, **arguments))
  assert 4 not in batch["index"]
  assert "004.png: it has no caption" in source.bad[4]
  with pytest.raises(DataError, match="no field 'title': .* are called caption"):
    open_source(f"folder:{tmp_path}", "train", caption="title")


# Tables.


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_csv_with_paths(tmp_path, delimiter):
  path = write_csv(tmp_path, delimiter)
  check(open_source(f"csv:{path}", "train", caption="title", fields=FIELDS))


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
  source = open_source(name, "train", caption="caption")
  check(source, captions, [str(10 * (i % 3)) for i in range(COUNT)])
  with pytest.raises(DataError, match=r"too much to hold; python -m clj.data.ingest"):
    open_source(name, "train", caption="caption", memory_limit=1000)


def test_splits_of_a_table(tmp_path):
  train = write_csv(tmp_path)
  train.rename(tmp_path / "train.csv")
  test = write_csv(tmp_path, label=lambda i: "bee" if i else "new")
  test.rename(tmp_path / "val.csv")
  name = f"csv:{tmp_path}/{{split}}.csv"
  data = {
    "source": name,
    "train_split": "train[:50%]",
    "test_split": "val",
    "data_dir": "",
    "fields": FIELDS,
  }
  train = sources.open_config(data, "train_split")
  assert len(train) == 15
  assert train.class_names == ("ant", "bee", "cat")
  test = sources.open_config(data, "test_split", train)
  # Numbered as in training; what training does not have is none.
  assert [r["label"] for r in test.read([0, 1])] == [-1, 1]
  both = sources.open_config(
    data | {"train_split": "train[10:]+val[:5]"}, "train_split"
  )
  assert len(both) == 25
  with pytest.raises(DataError, match="there is no such file"):
    sources.open_config(data | {"train_split": "dev"}, "train_split")


def test_what_is_wrong_in_a_table(tmp_path):
  path = write_csv(tmp_path)
  lines = path.read_text().splitlines(keepends=True)
  lines[1] = lines[1].replace("pictures/000.png", "http://example.org/a.jpg")
  lines[3] = lines[3].replace("pictures/001.png", "pictures/absent.png")
  path.write_text("".join(lines))
  source = open_source(f"csv:{path}", "train", caption="title", fields=FIELDS)
  url, absent, good = source.read([0, 1, 2])
  assert "img2dataset" in str(url)
  assert "absent.png" in str(absent)
  assert good["image"] == DATA[2]
  with pytest.raises(
    DataError, match=r"no column 'image' \(data.fields.image\); it has"
  ):
    open_source(f"csv:{path}", "train")
  with pytest.raises(DataError, match=r"no column 'text' \(data.text.field\)"):
    open_source(f"csv:{path}", "train", caption="text", fields=FIELDS)
  (tmp_path / "no.parquet").write_bytes(b"PAR1 not")
  with pytest.raises(DataError, match="is no table"):
    open_source(f"parquet:{tmp_path}/no.parquet", "train")


# Shards.


def test_shards_of_img2dataset(tmp_path):
  write_shards(tmp_path)
  labels = [str(i % 3) for i in range(COUNT)]
  for pattern in ("*.tar", "{00000..00001}.tar"):
    name = f"webdataset:{tmp_path}/{pattern}"
    check(open_source(name, "train", caption="caption"), None, labels)
  titles = [["a", f"{i}"] for i in range(COUNT)]
  check(open_source(name, "train", caption="titles"), titles, labels)
  assert len(open_source(name, "train[:10]")) == 10
  with pytest.raises(DataError, match="there is no such file"):
    open_source(f"webdataset:{tmp_path}/{{00000..00002}}.tar", "train")


def test_a_compressed_shard_is_not_read_at_random(tmp_path):
  write_shards(tmp_path, 1, "w:gz", "tar.gz")
  with pytest.raises(DataError, match="cannot be read at random.*clj.data.ingest"):
    open_source(f"webdataset:{tmp_path}/00000.tar.gz", "train")


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
    add(shard, "two.x.png", DATA[3])
    add(shard, "two.txt", b"two")


def test_members_that_lead_out_of_a_shard(tmp_path):
  write_bad_shard(tmp_path / "bad.tar")
  with tarfile.open(tmp_path / "bad.tar") as shard:
    found = list(files.samples(shard))
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
    "two",
  ]
  assert set(good[0].members) == {"png", "txt"}
  source = open_source(f"webdataset:{tmp_path}/bad.tar", "train", caption="caption")
  records = source.read(range(len(source)))
  kept = [r["caption"] for r in records if isinstance(r, dict)]
  assert kept == [["one"], ["broken"], [], ["two"]]


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
      *good, last = files.samples(shard)
    assert len(good) == count
    assert said in last.error
