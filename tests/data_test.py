"""The order of records, both paths to a batch, decoding, and what is wrong in data."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image, ImageOps

from clj.data import DataError, images, open_data, pipeline, tfds
from clj.data.order import order, uniform

CROPS = {"crop_scale": (0.2, 1.0), "crop_ratio": (3 / 4, 4 / 3), "views": 2}
WHOLE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "views": 1}


def opened(name, split="train", *, crops=CROPS, size=12, limit=2 << 30, **section):
  """A data set of pictures and labels; `columns` of the section are in their place.

  crops: of streamed pictures. limit: bytes that may be held in memory.
  """
  views = {"name": "views", "size": size, **crops}
  columns = {"image": {"kind": "image"}, "label": {"kind": "label"}}
  section = {"source": name, "train_split": split, "columns": columns} | section
  if "image" in section["columns"]:
    section["augment"] = {"image": views}
  return open_data(section, memory_limit=limit)


def in_memory(name, split="train", *, size=12, **kwargs):
  columns = {"image": {"memory_size": size}, "label": {"kind": "label"}}
  return opened(name, split, columns=columns, size=size, **kwargs)


def encode(picture, kind="PNG", **options):
  file = io.BytesIO()
  image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
  image.save(file, kind, **options)
  return file.getvalue()


def photograph(height, width, seed=0):
  """Smooth colours with some noise: JPEG encodes them much as it does photographs."""
  rng = np.random.default_rng(seed)
  coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
  smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), int)
  noise = rng.integers(-9, 10, (height, width, 3))
  return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def write_folder(root, count=50, side=12):
  """PNGs in three class folders; returns the pictures in the order of the records."""
  pictures = []
  for i in range(count):
    folder = root / "abc"[i * 3 // count]
    folder.mkdir(parents=True, exist_ok=True)
    pictures.append(photograph(side, side, seed=i))
    (folder / f"{i:04d}.png").write_bytes(encode(pictures[-1]))
  return np.stack(pictures)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("pictures")
  pictures = write_folder(root)
  return f"folder:{root}", pictures


def take(data, steps, *, seed=0, batch_size=16, step=0, rows=None):
  """The first batches, one after the other."""
  batches = data.batches(seed=seed, batch_size=batch_size, step=step, rows=rows)
  try:
    return [next(batches) for _ in range(steps)]
  finally:
    batches.close()


def evaluated(split, batch_size=16, **kwargs):
  return joined(list(split.batches(batch_size=batch_size, **kwargs)))


def joined(batches):
  return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


def one_view(batch):
  """The streamed crop of a whole picture, without its axis of views."""
  (view,) = np.swapaxes(batch["image"], 0, 1)
  return batch | {"image": view}


def assert_same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    assert a[key].dtype == b[key].dtype
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)


# The order.


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 65, 1000, 50_000])
def test_every_epoch_is_a_permutation(size):
  epochs = [order(5, e * size + np.arange(size), size) for e in (0, 1, 2**33)]
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
  if size >= 10:
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], np.arange(size))
    assert not np.array_equal(epochs[0], order(6, np.arange(size), size))


def test_order_is_a_function_of_the_position_alone():
  positions = np.array([[0, 7, 99], [100, 250, 10**15]])
  together = order(3, positions, 100)
  alone = [[int(order(3, int(p), 100)) for p in row] for row in positions]
  np.testing.assert_array_equal(together, alone)
  assert together.dtype == np.int64


def test_order_of_400_million_records_in_64_bits():
  size = 400_000_000
  start = 2**62 // size * size
  records = order(-1, start + np.arange(100_000), size)
  assert len(set(records.tolist())) == 100_000
  assert records.min() >= 0
  assert records.max() < size
  # Uniform: a tenth of the records in each tenth, to six standard deviations.
  tenths = np.bincount(records * 10 // size, minlength=10)
  np.testing.assert_allclose(tenths, 10_000, atol=6 * 95)


@pytest.mark.parametrize("size", [4, 10, 33])
def test_every_place_is_as_likely(size):
  seeds = 1000
  counts = np.zeros((size, size))
  for seed in range(seeds):
    counts[np.arange(size), order(seed, np.arange(size), size)] += 1
  expected = seeds / size
  chi_squared = ((counts - expected) ** 2 / expected).sum()
  freedom = (size - 1) ** 2
  mean, spread = freedom * size / (size - 1), np.sqrt(2 * freedom)
  assert abs(chi_squared - mean) < 6 * spread


def test_uniform_numbers():
  x = uniform(0, np.arange(100_000))
  assert 0 <= x.min() < 1e-3
  assert 1 - 1e-3 < x.max() < 1
  assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.02
  np.testing.assert_allclose(x.mean(), 0.5, atol=0.006)


# Batches.


def test_memory_and_stream_agree(folder):
  name, pictures = folder
  stream, memory = opened(name, crops=WHOLE), in_memory(name)
  assert stream.train.held is None
  assert memory.train.held is not None
  # Nine batches of 16 go through 50 records almost three times.
  streamed = one_view(joined(take(stream, 9)))
  gathered = joined(take(memory, 9))
  assert_same(streamed, gathered)
  for data, batch in ((stream, take(stream, 1)[0]), (memory, gathered)):
    assert batch.keys() == data.spec.keys()
    for key, value in batch.items():
      assert (value.shape[1:], value.dtype) == data.spec[key]
  positions = np.arange(9 * 16)
  np.testing.assert_array_equal(gathered["index"], order(0, positions, 50))
  np.testing.assert_array_equal(gathered["image"], pictures[gathered["index"]])
  np.testing.assert_array_equal(gathered["label"], gathered["index"] * 3 // 50)
  for size in (12, 8):
    columns = {"image": {"size": size}, "label": {}}
    held = {"image": {"size": size, "memory_size": 12}, "label": {}}
    found = [opened(name, columns=c).split("train") for c in (columns, held)]
    assert (found[0].held is None, found[1].held is None) == (True, False)
    assert_same(*map(evaluated, found))


@pytest.mark.parametrize("held", [True, False])
def test_rows_threads_and_restarts_change_nothing(folder, held):
  make = in_memory if held else opened
  data = make(folder[0], threads=1)
  whole = take(data, 5)
  assert_same(joined(take(make(folder[0], threads=3), 5)), joined(whole))
  assert_same(joined(take(data, 5, step=0)), joined(whole))
  assert_same(joined(take(data, 2, step=3)), joined(whole[3:]))
  halves = [take(data, 5, rows=rows) for rows in ((0, 5), (5, 16))]
  for batch, low, high in zip(whole, *halves):
    assert_same(joined([low, high]), batch)
  far = 2**40  # Positions beyond 32 bits.
  assert_same(take(data, 2, step=far - 1)[1], take(data, 1, step=far)[0])
  other = joined(take(data, 5, seed=1))
  assert not np.array_equal(other["index"], joined(whole)["index"])


def test_streamed_views_are_drawn_apart(folder):
  data = opened(folder[0], crops=CROPS | {"crop_scale": (0.2, 0.5)})
  batch = take(data, 1, batch_size=50)[0]
  again = take(data, 1, batch_size=50, step=1)[0]
  assert batch["image"].shape == (50, 2, 12, 12, 3)
  differs = (batch["image"][:, 0] != batch["image"][:, 1]).any((1, 2, 3))
  assert differs.mean() > 0.9
  first, second = (b["image"][np.argsort(b["index"])] for b in (batch, again))
  assert (first != second).any((1, 2, 3, 4)).all()


def test_a_streamed_crop_is_that_of_its_seed_and_position(folder):
  name, pictures = folder
  crops = {
    "image": {"name": "views", "size": 12, **CROPS},
    "small": {"name": "views", "of": "image", "size": 5, "views": 3},
  }
  section = {"source": name, "columns": {"image": {}}, "augment": crops}
  data = open_data(section)
  batch = take(data, 1, seed=4, step=3)[0]
  assert {key: value.shape for key, value in batch.items()} == {
    "index": (16,),
    "image": (16, 2, 12, 12, 3),
    "small": (16, 3, 5, 5, 3),
  }
  for row, index in enumerate(batch["index"]):
    chances = images.crop_chances(4, 48 + row, 2)
    for view in range(2):
      expected = images.crop_randomly(
        pictures[index], 12, chances[view], (0.2, 1.0), (3 / 4, 4 / 3)
      )
      np.testing.assert_array_equal(batch["image"][row, view], expected)
  alone = take(open_data(section | {"augment": {"image": crops["image"]}}), 1, seed=4,
               step=3)[0]  # fmt: skip
  np.testing.assert_array_equal(alone["image"], batch["image"])


def test_evaluation_holds_every_record_once(folder):
  name, pictures = folder
  split = opened(name).train
  batches = list(split.batches(batch_size=16))
  assert [b["image"].shape for b in batches] == [(16, 1, 12, 12, 3)] * 4
  whole = joined(batches)
  np.testing.assert_array_equal(whole["index"][:50], np.arange(50))
  np.testing.assert_array_equal(whole["index"][50:], -1)
  np.testing.assert_array_equal(whole["label"][50:], -1)
  np.testing.assert_array_equal(whole["image"][:50, 0], pictures)
  assert not whole["image"][50:].any()
  parts = [split.batches(batch_size=16, rows=rows) for rows in ((0, 8), (8, 16))]
  for batch, low, high in zip(batches, *parts):
    assert_same(joined([low, high]), batch)
  assert set(evaluated(split, keys=["label"])) == {"index", "label"}
  np.testing.assert_array_equal(split.labels(), whole["label"][:50])


@pytest.mark.parametrize("make", [opened, in_memory])
def test_given_records(folder, make):
  name, pictures = folder
  split = make(name).train
  wanted = [[3, 1, 49], [], list(range(40, 50))]
  found = list(split.record_batches(wanted, batch_size=10, keys=["image"]))
  for records, (batch, told) in zip(wanted, found):
    rows = len(records)
    assert batch["image"].shape == (10, 1, 12, 12, 3)
    np.testing.assert_array_equal(batch["image"][:rows, 0], pictures[records])
    assert not batch["image"][rows:].any()
    np.testing.assert_array_equal(batch["index"], records + [-1] * (10 - rows))
    assert [r["label"] for r in told] == [i * 3 // 50 for i in records]
    assert [r["id"] for r in told] == [
      f"{'abc'[i * 3 // 50]}/{i:04d}.png" for i in records
    ]
  (record,) = split.records([7])
  assert record["id"] == "a/0007.png" and record["path"].endswith(record["id"])
  np.testing.assert_array_equal(split.picture(7), pictures[7])


def test_rows_outside_the_batch(folder):
  with pytest.raises(ValueError, match=r"rows \(8, 17\)"):
    opened(folder[0]).batches(seed=0, batch_size=16, rows=(8, 17))


# Crops and decoding.


def test_crops_keep_to_area_aspect_and_picture():
  height, width = 60, 90
  rows, columns = np.mgrid[:height, :width]
  picture = np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)
  areas, aspects, tops = [], [], []
  for position in range(400):
    chances = images.crop_chances(0, position, 1)[0]
    crop = images.crop_randomly(picture, 8, chances, (0.2, 0.6), (3 / 4, 4 / 3))
    # The resized crop of a ramp spans its extent less one output pixel.
    low, high = crop[..., :2].min((0, 1)), crop[..., :2].max((0, 1))
    h, w = (high.astype(float) - low) * 8 / 7
    areas.append(h * w / (height * width))
    aspects.append(w / h)
    tops.append(low[0])
  assert 0.15 < min(areas) < 0.24
  assert 0.54 < max(areas) < 0.68
  np.testing.assert_allclose(np.mean(areas), 0.4, atol=0.03)
  assert 0.65 < min(aspects) < 0.8
  assert 1.25 < max(aspects) < 1.5
  assert np.std(tops) > 5
  # No shape of this aspect fits: the crop is cut to the picture.
  strip = images.crop_randomly(picture[:4], 8, chances, (1, 1), (1, 1))
  assert strip.shape == (8, 8, 3)


def test_shrunken_crops_do_not_alias():
  stripes = np.zeros((64, 64, 3), np.uint8)
  stripes[:, ::2] = 255
  chances = np.full(22, 0.5)
  crop = images.crop_randomly(stripes, 16, chances, (1, 1), (1, 1))
  np.testing.assert_allclose(crop, 127.5, atol=1)


def test_central_crop_leaves_a_picture_of_the_size_alone():
  picture = photograph(32, 32)
  np.testing.assert_array_equal(images.crop_centrally(picture, 32), picture)


RGB = photograph(37, 53)
GRAY = RGB[..., 0]
RGBA = np.dstack([RGB, np.linspace(0, 255, 37 * 53).reshape(37, 53).astype(np.uint8)])


def palette(transparent=False):
  image = Image.fromarray(RGB).quantize(16)
  return encode(image, "PNG", **({"transparency": 3} if transparent else {}))


def turned(kind, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return encode(RGB, kind, exif=exif)


def over_white(data):
  image = Image.open(io.BytesIO(data)).convert("RGBA")
  white = Image.new("RGBA", image.size, "white")
  return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def upright(data):
  image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
  return np.asarray(image.convert("RGB"))


def upper_bits(data):
  values = np.asarray(Image.open(io.BytesIO(data)))
  return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, 2)


PICTURES = {
  "jpeg": (encode(RGB, "JPEG"), upright),
  "progressive jpeg": (encode(RGB, "JPEG", progressive=True), upright),
  "grey jpeg": (encode(GRAY, "JPEG"), upright),
  "cmyk jpeg": (encode(Image.fromarray(RGB).convert("CMYK"), "JPEG"), upright),
  **{f"jpeg, exif {i}": (turned("JPEG", i), upright) for i in range(1, 9)},
  "png, exif": (turned("PNG", 6), upright),
  "webp, exif": (turned("WEBP", 8), upright),
  "jpeg with bytes after its end": (encode(RGB, "JPEG") + b"\0\n" + b"x" * 99, upright),
  "png": (encode(RGB), upright),
  "webp": (encode(RGB, "WEBP", lossless=True), upright),
  "bmp": (encode(RGB, "BMP"), upright),
  "gif": (encode(Image.fromarray(RGB).quantize(16), "GIF"), upright),
  "tiff": (encode(RGB, "TIFF"), upright),
  "cmyk tiff": (encode(Image.fromarray(RGB).convert("CMYK"), "TIFF"), upright),
  "grey png": (encode(GRAY), upright),
  "one-bit png": (encode(Image.fromarray(GRAY).convert("1")), upright),
  "palette": (palette(), upright),
  "palette, transparent": (palette(transparent=True), over_white),
  "alpha png": (encode(RGBA), over_white),
  "alpha webp": (encode(RGBA, "WEBP", lossless=True, exact=True), over_white),
  "grey with alpha": (encode(Image.fromarray(RGBA).convert("LA")), over_white),
  "transparent colour": (
    encode(RGB, transparency=tuple(RGB[3, 4].tolist())),
    over_white,
  ),
  "16-bit grey": (encode(GRAY.astype(np.uint16) * 256 + GRAY[::-1]), upper_bits),
}


@pytest.mark.parametrize("name", PICTURES)
def test_decodes_as_pillow_does(name):
  data, expected = PICTURES[name]
  picture = images.decode(data)
  assert picture.dtype == np.uint8
  # OpenCV rounds a CMYK JPEG's product down, Pillow to the nearest.
  tolerance = 1 if name == "cmyk jpeg" else 0
  np.testing.assert_allclose(picture.astype(int), expected(data), atol=tolerance)


def test_16_bit_colour():
  import cv2

  wide = RGB.astype(np.uint16) * 256 + 255 - RGB
  data = cv2.imencode(".png", wide[..., ::-1])[1].tobytes()
  np.testing.assert_array_equal(images.decode(data), RGB)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("length", [0, 9, 200, -100, -2])
def test_broken_pictures_are_refused(kind, length):
  data = encode(RGB, kind)
  if (kind, length) == ("PNG", -2):
    pytest.skip("all pixels are there: only the end chunk's checksum is cut")
  with pytest.raises(ValueError, match="."):
    images.decode(data[:length])


def test_text_is_no_picture():
  with pytest.raises(ValueError, match="cannot identify"):
    images.decode(b"no picture at all\n" * 10)


# Folders.


def test_folder_with_text_and_a_broken_jpeg(tmp_path, caplog):
  pictures = write_folder(tmp_path, 30)
  (tmp_path / "notes.txt").write_text("not a record")
  (tmp_path / "b" / "list.csv").write_text("neither")
  (tmp_path / ".hidden.png").write_bytes(b"")
  broken = tmp_path / "b" / "0010x.jpg"  # Record 11: after b/0010.png.
  broken.write_bytes(encode(RGB, "JPEG")[:500])
  data = opened(f"folder:{tmp_path}", crops=WHOLE)
  assert len(data.train) == 31
  assert data.train.classes["label"] == ("a", "b", "c")
  batches = take(data, 4, batch_size=31)
  for batch in batches:
    # Every good record once, and the one after the broken one twice.
    expected = np.sort(np.append(np.delete(np.arange(31), 11), 12))
    np.testing.assert_array_equal(np.sort(batch["index"]), expected)
  restarted = opened(f"folder:{tmp_path}", crops=WHOLE)
  assert_same(take(restarted, 1, batch_size=31, step=2)[0], batches[2])
  assert list(data.train.bad) == [11]
  messages = [r.getMessage() for r in caplog.records if "corrupt" in r.getMessage()]
  assert len(messages) == 2  # Once for each time that the folder was opened.
  assert "record 11" in messages[0]
  assert "0010x.jpg" in messages[0]
  held = in_memory(f"folder:{tmp_path}")
  assert_same(joined(take(held, 4, batch_size=31)), one_view(joined(batches)))
  for each in (data, held):
    whole = evaluated(each.train, 8)
    kept = whole["index"] >= 0
    np.testing.assert_array_equal(whole["index"][kept], np.delete(np.arange(31), 11))
    np.testing.assert_array_equal(whole["image"][kept, 0], pictures)
    np.testing.assert_array_equal(whole["label"] >= 0, kept)
  ((_, told),) = data.train.record_batches([[10, 11, 12]], batch_size=4)
  assert [isinstance(record, Exception) for record in told] == [False, True, False]


@pytest.mark.parametrize(("good", "broken"), [(40, 11), (0, 3)])
def test_too_many_corrupt_records_end_the_run(tmp_path, good, broken):
  write_folder(tmp_path, good) if good else None
  for i in range(broken):
    (tmp_path / f"x{i}.png").write_bytes(b"broken")
  with pytest.raises(DataError, match=f"{broken} of {good + broken} records"):
    take(opened(f"folder:{tmp_path}"), 20)


def test_ten_corrupt_records_do_not(tmp_path):
  write_folder(tmp_path, 40)
  for i in range(10):
    (tmp_path / f"x{i}.png").write_bytes(b"broken")
  data = opened(f"folder:{tmp_path}")
  take(data, 20)
  assert len(data.train.bad) == 10


def test_splits_of_a_folder(tmp_path):
  write_folder(tmp_path / "train", 30)
  write_folder(tmp_path / "val", 12)
  name = f"folder:{tmp_path}"
  data = opened(name)
  assert len(data.train) == 30
  assert len(data.test) == 12
  assert data.split("test") is data.test
  assert len(data.split("val[:50%]")) == 6
  assert len(data.split("train[10:]+test")) == 32
  inner = opened(f"{name}/val").train
  assert len(inner) == 12
  # Parts are mixed over the classes, and share nothing.
  parts = [opened(f"{name}/val", f"train[{p}]").train for p in (":75%", "75%:")]
  first, second = (part.source.files for part in parts)
  assert (len(first), len(second)) == (9, 3)
  assert sorted(first + second) == list(inner.source.files)
  assert first != inner.source.files[:9]
  with pytest.raises(DataError, match="no split 'dev'"):
    opened(name, "dev")


def test_a_flat_folder_has_no_labels(tmp_path):
  (tmp_path / "one.JPG").write_bytes(encode(RGB, "JPEG"))
  data = opened(f"folder:{tmp_path}")
  assert data.train.classes == {"image": None, "label": None}
  assert (take(data, 1)[0]["label"] == -1).all()
  assert data.train.labels() is None
  columns = {"image": {}, "label": {"kind": "label", "field": "label"}}
  with pytest.raises(DataError, match=r"no field 'label' \(data.columns.label.field\)"):
    opened(f"folder:{tmp_path}", columns=columns)


def test_an_empty_folder(tmp_path):
  (tmp_path / "readme.txt").write_text("")
  with pytest.raises(DataError, match="no image in .*1 other file"):
    opened(f"folder:{tmp_path}")
  with pytest.raises(DataError, match="there is no folder"):
    opened(f"folder:{tmp_path}/absent")


# TensorFlow Datasets.


def write_tfds(root, pictures, file_format="array_record"):
  """A prepared TFDS directory, written without TFDS and TensorFlow."""
  from array_record.python.array_record_module import ArrayRecordWriter

  def field(number, payload):
    return bytes([number << 3 | 2]) + varint(len(payload)) + payload

  def varint(value):
    out = b""
    while value > 127:
      out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])

  def example(picture, label):
    image = field(1, field(1, picture))
    label = field(3, field(1, varint(label)))
    entries = [(b"image", image), (b"label", label)]
    return field(1, b"".join(field(1, field(1, k) + field(2, v)) for k, v in entries))

  folder = root / "tiny" / "1.0.0"
  folder.mkdir(parents=True)
  file = folder / f"tiny-train.{file_format}-00000-of-00001"
  if file_format == "array_record":
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for i, picture in enumerate(pictures):
      writer.write(example(picture, i % 3))
    writer.close()
  else:
    file.write_bytes(struct.pack("<Q", 0))
  split = {"name": "train", "numBytes": "1", "shardLengths": [str(len(pictures))]}
  split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
  info = {"name": "tiny", "version": "1.0.0", "fileFormat": file_format}
  (folder / "dataset_info.json").write_text(json.dumps({**info, "splits": [split]}))
  prefix = "tensorflow_datasets.core.features."
  side = {"dimensions": ["12", "12", "3"]}
  features = {
    "image": {
      "pythonClassName": prefix + "image_feature.Image",
      "image": {"dtype": "uint8", "shape": side},
    },
    "label": {
      "pythonClassName": prefix + "class_label_feature.ClassLabel",
      "classLabel": {"numClasses": "3"},
    },
  }
  (folder / "features.json").write_text(
    json.dumps(
      {
        "pythonClassName": prefix + "features_dict.FeaturesDict",
        "featuresDict": {"features": features},
      }
    )
  )
  (folder / "label.labels.txt").write_text("x\ny\nz\n")
  return file


def test_a_prepared_data_set(tmp_path, monkeypatch):
  pictures = [photograph(12, 12, seed=i) for i in range(40)]
  kinds = [("PNG", {}), ("WEBP", {"lossless": True})]
  data = [encode(p, kinds[i % 2][0], **kinds[i % 2][1]) for i, p in enumerate(pictures)]
  write_tfds(tmp_path, data)
  memory = opened("tiny", data_dir=str(tmp_path))
  stream = opened("tiny", data_dir=str(tmp_path), limit=0, crops=WHOLE)
  assert memory.train.classes["label"] == ("x", "y", "z")
  assert memory.spec["image"].shape == (12, 12, 3)
  assert memory.train.held is not None
  assert stream.train.held is None
  assert stream.spec["image"].shape == (1, 12, 12, 3)
  assert_same(joined(take(memory, 6)), one_view(joined(take(stream, 6))))
  whole = evaluated(memory.train, 40)
  np.testing.assert_array_equal(whole["image"][:, 0], pictures)
  np.testing.assert_array_equal(whole["label"], np.arange(40) % 3)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  part = opened("tiny:1.0.0", "train[:25%]").train
  np.testing.assert_array_equal(evaluated(part, 10)["image"][:, 0], pictures[:10])
  with pytest.raises(DataError, match=r"no split 'test'.*it has: train"):
    opened("tiny").test  # noqa: B018
  with pytest.raises(DataError, match="is empty"):
    opened("tiny", "train[:0]")


def test_a_flipped_bit_in_a_record_file(tmp_path):
  # Incompressible pictures, so that a bit of a record is a bit of a picture.
  data = [encode(photograph(12, 12, seed=i)) for i in range(40)]
  file = write_tfds(tmp_path, data)
  raw = bytearray(file.read_bytes())
  raw[raw.index(data[7]) + 50] ^= 4
  file.write_bytes(raw)
  stream = opened("tiny", data_dir=str(tmp_path), limit=0, crops=WHOLE)
  memory = opened("tiny", data_dir=str(tmp_path))
  assert_same(joined(take(memory, 6)), one_view(joined(take(stream, 6))))
  assert list(stream.train.bad) == list(memory.train.bad) == [7]


def test_tfrecord_is_refused_with_the_command_that_converts_it(tmp_path):
  write_tfds(tmp_path, [b""], "tfrecord")
  command = "python -m clj.data.ingest .*tiny/1.0.0 OTHER_DATA_DIR/tiny$"
  with pytest.raises(DataError, match=command):
    opened("tiny", data_dir=str(tmp_path))


def test_a_directory_that_was_converted(tmp_path):
  pictures = [photograph(12, 12, seed=i) for i in range(4)]
  file = write_tfds(tmp_path, [encode(p) for p in pictures])
  # What TFDS's converter leaves: the old format, and the new one beside it.
  path = file.parent / "dataset_info.json"
  info = json.loads(path.read_text())
  info.update(fileFormat="tfrecord", alternativeFileFormats=["array_record"])
  path.write_text(json.dumps(info))
  split = opened("tiny", data_dir=str(tmp_path)).train
  np.testing.assert_array_equal(evaluated(split, 4)["image"][:, 0], pictures)


def test_a_missing_record_file(tmp_path):
  write_tfds(tmp_path, [encode(RGB)]).unlink()
  with pytest.raises(DataError, match="lacks the file"):
    opened("tiny", data_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["imagenet2012", "mnist", "no_such_set"])
def test_an_absent_data_set_names_the_ways_out(tmp_path, monkeypatch, name):
  def offline(*args, **kwargs):
    raise OSError("no network in this test")

  monkeypatch.setattr(tfds.urllib.request, "urlopen", offline)
  with pytest.raises(DataError) as error:
    opened(name, data_dir=str(tmp_path))
  message = str(error.value)
  assert "\n" not in message
  for way in (name, str(tmp_path), "tfds build", "data_dir", "shapes", "folder:/path"):
    assert way in message


def test_a_server_that_never_answers(monkeypatch):
  import threading

  never = threading.Event()
  monkeypatch.setattr(tfds.urllib.request, "urlopen", lambda *a, **k: never.wait())
  assert not tfds._answers("https://example.org/file")
  never.set()


def test_a_set_without_pictures(tfds_data_dir):
  said = r"no feature 'image' that is an image \(data.columns.image.field\).*sentence1"
  with pytest.raises(DataError, match=said):
    opened("stsb", data_dir=tfds_data_dir)


def test_cifar10_from_memory_and_stream(tfds_data_dir):
  kwargs = {"data_dir": tfds_data_dir, "crops": WHOLE, "size": 32}
  memory = opened("cifar10", "test[:200]", **kwargs)
  stream = opened("cifar10", "test[:200]", limit=0, **kwargs)
  assert len(memory.train.classes["label"]) == 10
  assert_same(joined(take(memory, 20)), one_view(joined(take(stream, 20))))


# What the pipeline may know.


def test_the_pipeline_knows_no_modality():
  with open(pipeline.__file__) as file:
    source = file.read()
  for word in ("image", "text", "label", '"size"'):
    assert word not in source


# Processes.

STREAMING = """
  import sys
  from clj.data import open_data
  views = {"name": "views", "size": 12, "views": 2, "crop_scale": (0.2, 1)}
  data = open_data({"source": sys.argv[1], "augment": {"image": views}})
  batches = data.batches(seed=0, batch_size=16)
  for _ in range(5):
    next(batches)
  print("running", flush=True)
  for _ in batches:
    pass
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")
def test_a_killed_run_leaves_nothing_behind(folder):
  shared = set(os.listdir("/dev/shm"))
  child = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(STREAMING), folder[0]],
    stdout=subprocess.PIPE,
    text=True,
  )
  with child:
    assert child.stdout.readline() == "running\n"
    tasks = os.listdir(f"/proc/{child.pid}/task")
    assert len(tasks) > 1  # Threads do the work,
    children = [open_children(child.pid, task) for task in tasks]
    child.send_signal(signal.SIGKILL)
  assert not any(children)  # and there is no process that could outlive it.
  assert set(os.listdir("/dev/shm")) - shared == set()


def open_children(pid, task):
  try:
    with open(f"/proc/{pid}/task/{task}/children") as file:
      return file.read().split()
  except OSError:  # A thread that has ended.
    return []
