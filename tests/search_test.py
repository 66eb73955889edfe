"""Indexes: right ids, the same after any kill, exact neighbours, pictures again."""

import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

import clj
from clj import embed, methods, search
from clj.data import Want, ingest, open_source
from clj.data.shapes import compositions
from clj.index import build, find
from clj.index import store as index
from clj.losses import l2_normalize
from configs import clip, simclr
from tests.written_run import PAIRS, PICTURES_ALONE, write_run

PICTURES = 21
BAD = (2, 7, 8, 20)  # of them


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A CLIP with towers of bfloat16, not trained."""
  config = clip.get_config("smoke").to_dict()
  for tower in ("image", "text"):
    config["model"][tower]["dtype"] = "bfloat16"
  return write_run(tmp_path_factory.mktemp("run"), config, PAIRS)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """A folder of pictures with one to three captions; four are broken."""
  folder = tmp_path_factory.mktemp("photos")
  drawn = compositions("train", count=PICTURES)
  for i in range(PICTURES):
    name = folder / f"{'ab'[i % 2]}" / f"{i:02d}"
    name.parent.mkdir(exist_ok=True)
    data = encoded(drawn["image"][i])
    broken = {2: data[:60], 7: b"", 8: b"no picture", 20: data[: len(data) // 2]}
    name.with_suffix(".png").write_bytes(broken.get(i, data))
    said = drawn["caption"][i][: i % 4]
    if said:
      name.with_suffix(".txt").write_text("\n".join(said))
  return folder


def encoded(picture):
  file = io.BytesIO()
  Image.fromarray(picture).save(file, "PNG")
  return file.getvalue()


def make(run, photos, out, **options):
  options = {"rows_per_shard": 6, "batch_size": 8, "what": "both"} | options
  return build.build(run, str(out), source=f"folder:{photos}", **options)


def contents(directory):
  names = sorted(n for n in os.listdir(directory) if not n.startswith("."))
  return {name: (directory / name).read_bytes() for name in names}


def all_rows(directory):
  """Every row of an index, its embedding among the columns."""
  found = index.open_index(str(directory))
  rows = []
  for part in found.there():
    notes = found.notes(part)
    count = notes["images"] + notes["texts"]
    z = np.concatenate([*found.blocks(part, 0, count), np.zeros((0, 16), np.float32)])
    rows += [
      row | {"embedding": vector}
      for row, vector in zip(found.rows(part, range(count)), z, strict=True)
    ]
  return rows


@pytest.mark.parametrize("format", index.FORMATS)
def test_every_embedding_has_its_own_id(run, photos, tmp_path, format):
  info = make(run, photos, tmp_path / "index", format=format)
  assert (info["images"], info["skipped"], info["parts"]) == (PICTURES - 4, 4, 4)
  assert info["complete"] and info["normalised"] and info["dim"] == 16
  assert len(info["reasons"]) == 4 and "b/07.png" in "".join(info["reasons"])
  rows = all_rows(tmp_path / "index")
  assert len(rows) == info["rows"] == info["images"] + info["texts"]
  model = clj.load(run)

  def unit(batch, key):
    z = model.embed(model.params, model.extra, batch)[key]
    return np.asarray(l2_normalize(z.astype(np.float32)))

  pictures = [row for row in rows if row["modality"] == "image"]
  texts = [row for row in rows if row["modality"] == "text"]
  expected = unit(model.preprocess([row["path"] for row in pictures]), "image")
  said = unit(model.tokenize([row["captions"][0] for row in texts]), "text")
  order = sorted(photos.rglob("*.png"))
  numbers = [i for i, path in enumerate(order) if int(path.stem) not in BAD]
  assert [row["record"] for row in pictures] == numbers
  for row, z in zip(pictures + texts, [*expected, *said], strict=True):
    np.testing.assert_allclose(row["embedding"], z, atol=0.01)  # bfloat16
    assert np.linalg.norm(row["embedding"]) == pytest.approx(1, abs=1e-5)
    path = order[row["record"]]
    assert row["path"] == str(path) and row["id"] == str(path.relative_to(photos))
    assert row["label"] == path.parent.name
  # The nearest wrong picture is not as near: ids are those of the pictures.
  similarity = np.stack([row["embedding"] for row in pictures]) @ expected.T
  assert (similarity.argmax(1) == np.arange(len(pictures))).all()
  beside = {p: p.with_suffix(".txt") for p in order}
  captions = [beside[order[i]].read_text().splitlines() if beside[order[i]].exists()
              else [] for i in numbers]  # fmt: skip
  assert [row["captions"] for row in pictures] == captions
  assert [row["captions"] for row in texts] == [[c] for each in captions for c in each]


def test_files_are_readable_without_clj(run, photos, tmp_path):
  from pyarrow import parquet

  make(run, photos, tmp_path / "a")
  make(run, photos, tmp_path / "b", format="npy")
  name = "part-00001-of-00004"
  table = parquet.read_table(tmp_path / "a" / f"{name}.parquet")
  vector = table.schema.field("embedding").type
  assert str(vector) == "fixed_size_list<element: float not null>[16]"
  array = np.load(tmp_path / "b" / f"{name}.npy")
  beside = json.loads((tmp_path / "b" / f"{name}.json").read_text())
  assert array.dtype == np.float32 and array.shape == (table.num_rows, 16)
  np.testing.assert_array_equal(array, np.stack(table["embedding"].to_numpy()))
  for column in index.COLUMNS:
    assert table[column].to_pylist() == beside[column]


def test_a_killed_run_goes_on_to_the_same_bytes(run, photos, tmp_path, monkeypatch):
  make(run, photos, tmp_path / "whole", format="npy")
  write, calls = index.Index.write, []

  def killed(self, *args):
    calls.append(args)
    if len(calls) == 3:
      (tmp_path / "cut" / ".part-00002.npy.partial").write_bytes(b"half")
      raise KeyboardInterrupt
    write(self, *args)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(index.Index, "write", killed)
    make(run, photos, tmp_path / "cut", format="npy")
  cut = index.open_index(str(tmp_path / "cut"))
  assert cut.there() == [0, 1] and not cut.info["complete"]
  before = os.stat(cut.file(0)).st_mtime_ns
  for changed in ({"format": "parquet"}, {"what": "image"}, {"rows_per_shard": 7}):
    with pytest.raises(ValueError, match=f"other settings .*{next(iter(changed))}"):
      make(run, photos, tmp_path / "cut", **({"format": "npy"} | changed))
  make(run, photos, tmp_path / "cut", format="npy")
  assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
  assert os.stat(cut.file(0)).st_mtime_ns == before
  assert not (tmp_path / "cut" / ".part-00002.npy.partial").exists()
  with monkeypatch.context() as patch:  # complete: nothing is done again
    patch.setattr(index.Index, "write", None)
    assert make(run, photos, tmp_path / "cut", format="npy")["complete"]


def synthetic(directory, format, sizes=((40, 3), (0, 0), (17, 9)), dim=8):
  """An index of random embeddings: (images, texts) of each part."""
  rng = np.random.default_rng(0)
  info = {"format": format, "parts": len(sizes), "dim": dim, "complete": False}
  directory.mkdir()
  made = index.Index(str(directory), info).write_info()
  everything = {"image": [], "text": []}
  for part, counts in enumerate(sizes):
    modality = [m for m, n in zip(("image", "text"), counts) for _ in range(n)]
    z = rng.normal(size=(len(modality), dim)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    columns = {name: [None] * len(z) for name in index.COLUMNS}
    columns |= {"modality": modality, "id": [f"{part}/{i}" for i in range(len(z))]}
    notes = dict(zip(("images", "texts"), counts)) | {"skipped": 0}
    made.write(part, z, columns, notes)
    for m, vector, name in zip(modality, z, columns["id"]):
      everything[m].append((vector, name))
  return made, everything


@pytest.mark.parametrize("format", index.FORMATS)
def test_neighbours_are_exact(tmp_path, monkeypatch, format):
  monkeypatch.setattr(index, "BLOCK", 7)
  made, everything = synthetic(tmp_path / "index", format)
  queries = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
  for among, rows in everything.items():
    scores = queries @ np.stack([z for z, _ in rows]).T
    names = [name for _, name in rows]
    for k in (1, 4, 12, 1000):
      hits = find.search(made, queries, k, among)
      for near, row in zip(hits, scores, strict=True):
        order = np.argsort(-row)[:k]
        assert [hit.row["id"] for hit in near] == [names[i] for i in order]
        np.testing.assert_allclose([h.score for h in near], row[order], rtol=1e-5)
  os.remove(made.file(0))  # of those that are there
  near = find.search(made, queries, 100)[0]
  assert {hit.row["id"].split("/")[0] for hit in near} == {"2"} and len(near) == 17
  os.remove(made.file(2))
  with pytest.raises(ValueError, match="no embedding of text in the 1 files there"):
    find.search(made, queries, 1)


def test_a_broken_part_is_said(tmp_path):
  for format in index.FORMATS:
    made, _ = synthetic(tmp_path / format, format)
    with open(made.file(2), "r+b") as file:
      file.truncate(150)
    notes = {"images": [40, 0, 17], "texts": [3, 0, 9]}
    made = made.write_info(rows_of_parts=notes)
    with pytest.raises(ValueError, match=r"part-00002.* cannot be read .*remove it"):
      find.search(made, np.ones((1, 8), np.float32), 3)


def of_table(folder, pictures):
  from pyarrow import parquet, table

  parquet.write_table(
    table({"image": pictures, "caption": [f"number {i}" for i in range(4)]}),
    folder / "table.parquet",
  )
  return f"parquet:{folder}/table.parquet", {}


def of_csv(folder, pictures):
  with open(folder / "table.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["image", "caption"])
    for i, data in enumerate(pictures):
      (folder / f"{i}.png").write_bytes(data)
      writer.writerow([f"{i}.png", f"number {i}"])
  return f"csv:{folder}/table.csv", {}


def of_shards(folder, pictures):
  with tarfile.open(folder / "0.tar", "w") as shard:
    for i, data in enumerate(pictures):
      for name, content in ((f"k{i}.png", data), (f"k{i}.txt", f"number {i}".encode())):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        shard.addfile(member, io.BytesIO(content))
  return f"webdataset:{folder}/0.tar", {}


def of_tfds(folder, pictures):
  ingest.ingest(of_csv(folder, pictures)[0], str(folder / "tfds" / "mine"))
  return "mine", {"data_dir": str(folder / "tfds")}


IDS = {
  of_table: ["0", "1", "2", "3"],
  of_csv: ["0.png", "1.png", "2.png", "3.png"],
  of_shards: ["0.tar:k0", "0.tar:k1", "0.tar:k2", "0.tar:k3"],
  of_tfds: ["table.csv:0", "table.csv:1", "table.csv:2", "table.csv:3"],
}


@pytest.mark.parametrize("write", IDS)
def test_pictures_are_found_again(run, tmp_path, write):
  pictures = compositions("test", count=4)["image"]
  source, options = write(tmp_path, [encoded(p) for p in pictures])
  out = str(tmp_path / "index")
  build.build(run, out, source=source, batch_size=8, **options)
  rows = all_rows(tmp_path / "index")
  assert [row["id"] for row in rows] == IDS[write]
  assert [row["captions"] for row in rows] == [[f"number {i}"] for i in range(4)]
  read = find.Pictures(index.open_index(out))
  for row, picture in zip(rows, pictures, strict=True):
    np.testing.assert_array_equal(read(row), picture)
  missing = read(rows[0] | {"path": None, "id": "another"})
  assert missing is None and "has changed since" in read.fault


def test_tfds_ids_are_those_of_tfds(tfds_data_dir):
  wants = {"image": Want("image", "image")}
  source = open_source("cifar10", "test[7:]", tfds_data_dir, wants=wants)
  ids = [record["__key__"] for record in source.read([0, 5])]
  file = "cifar10-test.array_record-00000-of-00001"
  assert ids == [f"{file}__7", f"{file}__12"]


def test_a_search_as_a_user_does_it(run, photos, tmp_path, capsys):
  out, grid = str(tmp_path / "index"), tmp_path / "grid.png"
  arguments = [f"--workdir={run}", f"--out={out}", "--batch_size=8"]
  assert embed.main([*arguments, f"--source=folder:{photos}"]) == 0
  said = capsys.readouterr().out
  assert f"{out} is complete: 17 embeddings of width 16 in 1 files" in said
  assert "4 corrupt records skipped" in said
  picture = photos / "b" / "05.png"
  arguments = [f"--index={out}", "--text", "a red star", f"--image={picture}"]
  assert search.main([*arguments, "--k=3", f"--out={grid}"]) == 0
  said = capsys.readouterr().out
  assert "a red star\nrank  score" in said and "   1  1.0000  b/05.png" in said
  image = np.asarray(Image.open(grid))
  assert image.shape[1] == 6 + 4 * (find.TILE + 6)
  tile = image[-find.TILE - 51 : -51, 6 : 6 + find.TILE]  # of the picture itself
  again = image[-find.TILE - 51 : -51, 12 + find.TILE : 12 + 2 * find.TILE]
  np.testing.assert_array_equal(tile, again)
  assert tile.std() > 5
  assert search.main([*arguments, "--k=99", "--json", "--out="]) == 0
  text, image = json.loads(capsys.readouterr().out)
  assert [len(text["results"]), len(image["results"])] == [17, 17]
  assert image["results"][0]["id"] == "b/05.png" and image["results"][0]["rank"] == 1


def test_shapes_are_the_data_of_the_run(run, tmp_path):
  info = build.build(run, str(tmp_path / "index"), batch_size=256)
  assert (info["source"], info["split"]) == ("shapes/compositions", "test[:256]")
  row = all_rows(tmp_path / "index")[9]
  drawn = compositions("test")
  assert row["id"] == "9" and row["captions"] == drawn["caption"][9]
  read = find.Pictures(index.open_index(str(tmp_path / "index")))
  np.testing.assert_array_equal(read(row), drawn["image"][9])


def test_simclr_searches_by_picture(photos, tmp_path):
  config = simclr.get_config("smoke").to_dict()
  run = write_run(tmp_path / "run", config, PICTURES_ALONE)
  info = make(run, photos, tmp_path / "index", what="image")
  assert info["outputs"] == {"image": "features"} and info["tokenizer"] is None
  found = index.open_index(str(tmp_path / "index"))
  model = find.open_model(found)
  with pytest.raises(ValueError, match="has no text tower: search by --image"):
    find.embed_queries(found, model, ["a red star"], [])
  queries = find.embed_queries(found, model, [], [photos / "b" / "05.png"])
  assert find.search(found, queries, 1)[0][0].row["id"] == "b/05.png"
  with pytest.raises(ValueError, match="no text tower: use --what=image"):
    make(run, photos, tmp_path / "other", what="both")
  # Other weights in the same place.
  other = write_run(tmp_path / "run2", config | {"seed": 1}, PICTURES_ALONE)
  with pytest.raises(ValueError, match="made by other weights"):
    find.open_model(found, other)
  with pytest.raises(ValueError, match="other settings .*weights"):
    make(other, photos, tmp_path / "index", what="image")


class Texts(NamedTuple):
  """A method of texts alone, such as SimCSE: bags of words."""

  @staticmethod
  def init(rng, batch):
    del batch
    return {"table": jax.random.normal(rng, (64, 8))}, {"empty": {}}

  @staticmethod
  def embed(params, extra, batch):
    words = params["table"][batch["text"]] * batch["text_mask"][..., None]
    return {"features": words.sum(1)}


class Arrays(NamedTuple):
  """A method of arrays."""

  @staticmethod
  def init(rng, batch):
    return {"kernel": jax.random.normal(rng, (batch["x"].shape[1], 8))}, {}

  @staticmethod
  def embed(params, extra, batch):
    return {"features": batch["x"] @ params["kernel"]}


def test_texts_alone_are_found(tmp_path, monkeypatch):
  make_texts = lambda model, total_steps: Texts
  monkeypatch.setitem(methods.METHODS, "texts", make_texts)
  data = PAIRS | {"columns": {"text": PAIRS["columns"]["text"]}, "augment": {}}
  config = simclr.get_config("smoke").to_dict() | {"method": {"name": "texts"}}
  run = write_run(tmp_path / "run", config, data, Texts)
  out = str(tmp_path / "index")
  info = build.build(run, out, split="test[:20]", batch_size=8, rows_per_shard=8)
  assert info["outputs"] == {"text": "features"} and info["what"] == "text"
  assert (info["images"], info["texts"], info["dim"]) == (0, 20, 8)
  found = index.open_index(out)
  said = compositions("test")["caption"][7][0]
  queries = find.embed_queries(found, find.open_model(found), [said], [])
  ((best, *_),) = find.search(found, queries, 3)
  assert best.score == pytest.approx(1, abs=1e-5) and best.row["modality"] == "text"
  model = clj.load(run)
  with pytest.raises(ValueError, match="has no image tower: search by --text"):
    find.embed_queries(found, model, [], [np.zeros((9, 9, 3), np.uint8)])
  assert model.preprocess is None and sorted(model.inputs["text"]([said])) == [
    *("text", "text_mask"),
  ]


def test_arrays_are_embedded(tmp_path, monkeypatch):
  from pyarrow import parquet, table

  monkeypatch.setitem(methods.METHODS, "arrays", lambda model, total_steps: Arrays)
  x = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
  parquet.write_table(
    table({"x": list(x), "kind": ["a", "b"] * 6}), tmp_path / "x.parquet"
  )
  data = {
    "source": f"parquet:{tmp_path}/x.parquet",
    "test_split": "train",
    "columns": {"x": {"kind": "array"}, "label": {"kind": "label", "field": "kind"}},
  }
  config = simclr.get_config("smoke").to_dict() | {"method": {"name": "arrays"}}
  run = write_run(tmp_path / "run", config, data, Arrays)
  info = build.build(run, str(tmp_path / "index"), batch_size=8, rows_per_shard=7)
  assert info["outputs"] == {"x": "features"} and info["images"] == info["rows"] == 12
  found = index.open_index(str(tmp_path / "index"))
  model = find.open_model(found)
  z = x @ np.asarray(model.params["kernel"])
  z /= np.linalg.norm(z, axis=1, keepdims=True)
  rows = [row for p in (0, 1) for row in found.rows(p, range(7 - 2 * p))]
  assert [row["label"] for row in rows] == ["a", "b"] * 6
  assert {row["modality"] for row in rows} == {"x"}
  hits = find.search(found, z, 1)
  assert [hit[0].row["record"] for hit in hits] == list(range(12))
  made = model.embed(model.params, model.extra, model.inputs["x"](list(x)))["features"]
  np.testing.assert_allclose(made / np.linalg.norm(made, axis=1, keepdims=True), z,
                             atol=1e-5)  # fmt: skip


def test_what_is_wrong_is_said_in_a_line(run, photos, tmp_path, capsys):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "mine.txt").write_text("")
  (tmp_path / "wrong").mkdir()
  (tmp_path / "wrong" / "index.json").write_text("{}")
  out, none = f"--out={tmp_path}/out", "--workdir=/none"
  source = [f"--workdir={run}", f"--source=folder:{photos}"]
  for program, arguments, line in (
    (embed, [none, out], "/none is not the workdir of a run"),
    (embed, [*source, out, "--format=csv"], "no format 'csv'; there are: parquet, npy"),
    (embed, [*source, out, "--what=sound"], "--what=sound: there are image, text"),
    (embed, [*source, out, "--batch_size=0"], "--batch_size=0: it is 1 or more"),
    (embed, [*source, f"--out={tmp_path}/full"], "has other files in it (mine.txt)"),
    (embed, [*source, "--out=gs://b/x"], "gs://b/x is no local directory"),
    (embed, [*source, out, "--process_id=0"], "--coordinator, --num_processes missing"),
    (embed, [source[0], out, "--source=folder:/no"], "there is no folder '/no'"),
    (embed, [*source, out, "--caption=title"], "has no field 'title'"),
    (search, ["--index=/none", "--text=x"], "there is no index in '/none'"),
    (search, [f"--index={tmp_path}/wrong", "--text=x"], "is not of an index"),
    (search, ["--text= "], "--text is empty"),
    (search, [], "nothing to look for"),
    (search, ["--text=x", "--k=0"], "--k=0: it is 1 or more"),
  ):
    assert program.main(arguments) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and line in error[0], error
  made, _ = synthetic(tmp_path / "half", "npy")
  os.remove(made.file(1))
  assert search.main([f"--index={tmp_path}/half", "--image=/none.png"]) == 1
  first, second = capsys.readouterr().err.splitlines()
  assert "is incomplete: 2 of 3 files are there, and only those are searched" in first
  assert "--image=/none.png: No such file" in second
  for part in (0, 2):
    os.remove(made.file(part))
  assert search.main([f"--index={tmp_path}/half", "--text=x"]) == 1
  assert "is incomplete, with none of 3 files" in capsys.readouterr().err


def command(run, photos, out, *more):
  return subprocess.Popen(
    [sys.executable, "-m", "clj.embed", f"--workdir={run}", f"--out={out}"]
    + [f"--source=folder:{photos}", "--rows_per_shard=2", "--batch_size=8", *more],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )


@pytest.mark.slow
def test_kill_9_at_any_moment(run, photos, tmp_path):
  whole = command(run, photos, tmp_path / "whole")
  assert whole.communicate(timeout=120) and whole.returncode == 0
  for files in (1, 4, 8):
    process = command(run, photos, tmp_path / "cut")
    while process.poll() is None:
      there = tmp_path / "cut"
      if there.is_dir() and len(list(there.glob("part-*"))) >= files:
        os.killpg(process.pid, signal.SIGKILL)
        break
      time.sleep(0.001)
    process.communicate()
  last = command(run, photos, tmp_path / "cut")
  said, _ = last.communicate(timeout=120)
  assert last.returncode == 0 and "is complete: 17 embeddings" in said
  assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_several_processes_write_the_same_files(run, photos, tmp_path):
  whole = command(run, photos, tmp_path / "whole")
  assert whole.communicate(timeout=120) and whole.returncode == 0
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
  both = [
    command(run, photos, tmp_path / "two", *flags, f"--process_id={i}")
    for i in range(2)
  ]
  for process in both:
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said
  assert contents(tmp_path / "two") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
  "said", [{"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, {}]
)
def test_the_environment_says_how_many_devices(said):
  """The CPU is split where nothing is said, and only there."""
  code = (
    "import jax; from clj.cli import cpu_devices, split_cpu; split_cpu(64); "
    "print(len(jax.devices()) == (EXPECTED or cpu_devices(64)))"
  ).replace("EXPECTED", "3" if said else "0")
  environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
  environment |= {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"} | said
  done = subprocess.run(
    [sys.executable, "-c", code], env=environment, capture_output=True, text=True
  )
  assert done.stdout.strip() == "True", done.stderr
