"""Columns of every kind: from memory and streamed the same rows, as they are stored."""

import io
import json

import numpy as np
import pytest

from clj.data import DataError, Source, columns, expected_spec, open_data
from clj.data.order import order
from tests.data_test import assert_same, evaluated, joined, take, write_tfds


def source_of(**values):
  """A source that is read record by record."""
  size = len(next(iter(values.values())))

  def read(indices, names):
    return [{"__key__": str(i)} | {n: values[n][i] for n in names} for i in indices]

  return Source("made", size, tuple(values), read)


def both_of(section, source=None):
  """A data set that is held in memory, and the same streamed."""
  memory, stream = (
    open_data(section, memory_limit=m, source=source) for m in (1 << 30, 0)
  )
  assert (memory.train.held is None, stream.train.held is None) == (False, True)
  return memory, stream


def check_both(memory, stream, steps=8, batch_size=7):
  """They agree, whatever the rows; returns training batches, and evaluation's."""
  trained = joined(take(memory, steps, batch_size=batch_size, seed=3))
  assert_same(joined(take(stream, steps, batch_size=batch_size, seed=3)), trained)
  for key, like in memory.spec.items():
    assert (trained[key].shape[1:], trained[key].dtype) == like
    assert stream.spec[key] == like
  for data in (memory, stream):
    later = take(data, 1, step=5, batch_size=batch_size, rows=(2, 6), seed=3)[0]
    mine = slice(5 * batch_size + 2, 5 * batch_size + 6)
    assert_same(later, {key: value[mine] for key, value in trained.items()})
  whole = evaluated(memory.train)
  assert_same(evaluated(stream.train), whole)
  return trained, whole


# Arrays.


def test_arrays_of_one_shape():
  values = np.random.default_rng(0).normal(size=(30, 4, 2))
  trained, whole = check_both(
    *both_of({"columns": {"x": {"kind": "array"}}}, source_of(x=values))
  )
  assert trained["x"].dtype == np.float32
  np.testing.assert_array_equal(trained["x"], values[trained["index"]].astype("f4"))
  np.testing.assert_array_equal(whole["x"][:30], values.astype("f4"))
  np.testing.assert_array_equal(trained["index"], order(3, np.arange(56), 30))


def test_ragged_arrays_are_padded():
  rng = np.random.default_rng(0)
  values = [
    rng.integers(1, 99, (i % 7, 3)).tolist() or np.zeros((0, 3)) for i in range(30)
  ]
  section = {"columns": {"x": {"kind": "array", "length": 5, "dtype": "int32"}}}
  trained, _ = check_both(*both_of(section, source_of(x=values)))
  for index, row, mask in zip(trained["index"], trained["x"], trained["x_mask"]):
    count = min(index % 7, 5)
    np.testing.assert_array_equal(mask, np.arange(5) < count)
    np.testing.assert_array_equal(row[:count], np.asarray(values[index])[:count])
    assert not row[count:].any()


@pytest.mark.parametrize(
  ("value", "expected", "dtype"),
  [
    (3, 3, "int32"),
    ([1, 2], [1, 2], "int32"),
    ([0.5, 2.0], [0.5, 2], "float32"),
    ("3.5", 3.5, "float32"),
    (b"[[1, 2], [3, 4]]", [[1, 2], [3, 4]], "float32"),
    (np.uint8([7, 8]), [7, 8], "uint8"),
    (np.array(True), True, "bool"),
  ],
)
def test_what_is_an_array(value, expected, dtype):
  found = columns.numbers(value)
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, expected)


def test_files_as_arrays():
  import cv2

  deep = np.arange(12, dtype=np.uint16).reshape(3, 4) * 4000
  colour = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
  for array in (deep, colour):
    bgr = array[..., ::-1] if array.ndim == 3 else array
    found = columns.numbers(cv2.imencode(".png", bgr)[1].tobytes())
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
  file = io.BytesIO()
  np.save(file, deep.astype(np.float64))
  np.testing.assert_array_equal(columns.numbers(file.getvalue()), deep.astype("f4"))


@pytest.mark.parametrize(
  ("values", "options", "said"),
  [
    ([[1, 2], [3]] * 20, {}, r"shape is .*: data.columns.x.length pads arrays to one"),
    (["no number"] * 5, {}, "data.columns.x cannot be made of 'x'"),
    ([[2**40]] * 5, {}, "its numbers do not fit in int32"),
    ([3] * 5, {"length": 2}, "data.columns.x.length is 2; but each value is one"),
    ([[0.5]] * 5, {"dtype": "int32"}, "its numbers do not fit in int32"),
    ([[1]] * 5, {"legnth": 2}, "no key 'legnth' in data.columns.x; did you mean 'len"),
  ],
)
def test_what_is_no_array(values, options, said):
  section = {"columns": {"x": {"kind": "array"} | options}}
  with pytest.raises(ValueError, match=said):
    take(open_data(section, source=source_of(x=values)), 20)


def test_arrays_of_tfds(tfds_data_dir):
  section = {"data_dir": tfds_data_dir, "train_split": "train[:60]"}
  imu = {"signal": {"kind": "array", "length": 96}, "label": {}}
  data = both_of(section | {"source": "hmp_imu", "columns": imu})
  trained, whole = check_both(*data)
  assert data[0].spec["signal"] == ((96, 3), np.uint8)
  assert whole["signal_mask"][:60].any(1).all()
  assert set(trained["label"]) <= set(range(14))
  items = {"item_ids": {"kind": "array", "length": 40}, "user_id": {"kind": "array"}}
  found = check_both(*both_of(section | {"source": "lastfm", "columns": items}))[0]
  assert found["item_ids"].shape == (56, 40)
  assert found["user_id"].shape == (56,)
  edges = {"edges": {"kind": "array", "length": 50}, "label": {}}
  found = check_both(*both_of(section | {"source": "mutag", "columns": edges}))[1]
  assert found["edges"].shape == (64, 50, 2)


def test_depth_maps_of_tfds(tfds_data_dir):
  section = {"source": "nyuv2_rgbd", "data_dir": tfds_data_dir}
  section |= {"train_split": "train[:24]", "columns": {"depth": {"kind": "array"}}}
  trained, whole = check_both(*both_of(section))
  assert trained["depth"].dtype == np.uint16
  assert whole["depth"][:24].max() > 2000  # millimetres
  picture = {"image": {"size": 32}, "depth": {"kind": "array"}}
  views = {"image": {"name": "views", "size": 24, "views": 2}}
  data = open_data(section | {"columns": picture, "augment": views})
  batch = take(data, 1)[0]
  assert batch["image"].shape == (16, 2, 24, 24, 3)
  assert batch["depth"].shape[0] == 16


# Sounds.


def flac(samples, rate):
  soundfile = pytest.importorskip("soundfile")
  file = io.BytesIO()
  soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_16")
  return file.getvalue()


def tone(count, rate, pitch=440.0):
  return 0.5 * np.sin(2 * np.pi * pitch * np.arange(count) / rate)


def test_windows_of_sounds():
  lengths = [0 if i == 5 else 50 + 37 * i for i in range(20)]
  # Sample j of record i is i + j / 2**12, so that a window tells where it is from.
  sounds = [i / 32 + np.arange(n) / 2**15 for i, n in enumerate(lengths)]
  values = [(sound.astype(np.float32), 1000) for sound in sounds]
  values[3] = np.stack([values[3][0]] * 2, 1), 1000  # both channels are the same
  options = {"kind": "audio", "rate": 1000, "seconds": 0.3}
  source = source_of(x=values)
  memory = open_data({"columns": {"x": options | {"memory": True}}}, source=source)
  stream = open_data({"columns": {"x": options}}, source=source)
  assert (memory.train.held is None, stream.train.held is None) == (False, True)
  trained, whole = check_both(memory, stream, steps=40)
  starts = {}
  for index, row, mask in zip(trained["index"], trained["x"], trained["x_mask"]):
    count = min(lengths[index], 300)
    np.testing.assert_array_equal(mask, np.arange(300) < count)
    assert not row[count:].any()
    if count:
      start = int(round((row[0] - index / 32) * 2**15))
      expected = sounds[index][start : start + count].astype(np.float32)
      np.testing.assert_array_equal(row[:count], expected)
      starts.setdefault(int(index), set()).add(start)
  assert starts[1] == {0}
  assert len(starts[19]) > 8
  assert max(starts[19]) <= lengths[19] - 300
  middle = (lengths[19] - 300) // 2
  np.testing.assert_array_equal(whole["x"][19], np.float32(sounds[19])[middle:][:300])


def test_sounds_are_resampled():
  pytest.importorskip("soxr")
  whole = columns.sound(flac(tone(8000, 8000), 8000), 16000)
  assert whole.dtype == np.float32
  assert len(whole) == 16000
  np.testing.assert_allclose(whole[800:-800], tone(16000, 16000)[800:-800], atol=2e-3)
  stereo = flac(np.stack([tone(800, 8000), -tone(800, 8000)], 1), 8000)
  np.testing.assert_allclose(columns.sound(stereo, 8000), 0, atol=1e-4)
  integers = np.int64(tone(800, 8000) * 2**15)  # as TFDS's Audio has them
  np.testing.assert_allclose(
    columns.sound((integers, 8000), 8000), tone(800, 8000), atol=1e-4
  )


def test_libraries_that_are_missing(monkeypatch):
  for name in ("soundfile", "soxr"):
    monkeypatch.setitem(__import__("sys").modules, name, None)
  options = {"kind": "audio", "rate": 16000}
  for value, library in ((b"fLaC", "soundfile"), ((np.zeros(9), 8000), "soxr")):
    data = open_data({"columns": {"x": options}}, source=source_of(x=[value] * 20))
    with pytest.raises(ValueError, match=f"pip install {library}"):
      take(data, 1)


def test_broken_sounds_are_replaced():
  values = [flac(tone(900, 8000, 100 + i), 8000) for i in range(12)]
  values[4] = b"no sound"
  options = {"kind": "audio", "rate": 8000, "seconds": 0.1}
  source = source_of(x=values)
  stream = open_data({"columns": {"x": options}}, source=source)
  assert not (joined(take(stream, 4))["index"] == 4).any()
  assert "it is no sound" in stream.train.bad[4]


def test_what_is_held_is_held_whole():
  source = source_of(image=[b""] * 9, x=[b""] * 9)
  found = {"image": {"memory_size": 8}, "x": {"kind": "audio"}}
  data = open_data({"columns": found}, source=source)
  said = (
    "data.columns.image.memory_size holds made in memory, but data.columns.x is str"
  )
  with pytest.raises(DataError, match=said):
    data.spec  # noqa: B018


def test_spoken_digits(tfds_data_dir):
  pytest.importorskip("soundfile")
  pytest.importorskip("soxr")
  audio = {"kind": "audio", "rate": 16000, "seconds": 0.5}
  text = {"tokenizer": "words", "length": 8}
  section = {"source": "fsdd", "data_dir": tfds_data_dir, "train_split": "train[:40]"}
  held = {"audio": audio | {"memory": True}, "text": text, "label": {}}
  memory = open_data(section | {"columns": held})
  stream = open_data(section | {"columns": held | {"audio": audio}})
  assert (memory.train.held is None, stream.train.held is None) == (False, True)
  trained, whole = check_both(memory, stream)
  assert trained["audio"].shape == (56, 8000)
  assert 0.05 < np.abs(whole["audio"][:40]).max() <= 1.1
  assert trained["audio_mask"][:, 0].all()


def test_audio_features_of_tfds(tmp_path):
  from array_record.python.array_record_module import ArrayRecordWriter
  from tensorflow_datasets.proto import tf_example_generated_pb2 as proto

  file = write_tfds(tmp_path, [b""] * 6)
  samples = [np.int64(tone(100 + i, 8000) * 2**15) for i in range(6)]
  writer = ArrayRecordWriter(str(file), "group_size:1")
  for each in samples:
    example = proto.Example()
    example.features.feature["sound"].int64_list.value.extend(each.tolist())
    writer.write(example.SerializeToString())
  writer.close()
  prefix, shape = "tensorflow_datasets.core.features.", {"dimensions": ["-1"]}
  sound = {"sampleRate": "8000", "dtype": "int64", "shape": shape, "encoding": "none"}
  sound = {"pythonClassName": f"{prefix}audio_feature.Audio", "audio": sound}
  described = {
    "pythonClassName": f"{prefix}features_dict.FeaturesDict",
    "featuresDict": {"features": {"sound": sound}},
  }
  (file.parent / "features.json").write_text(json.dumps(described))
  column = {"kind": "audio", "field": "sound", "rate": 8000, "seconds": 0.01}
  section = {"source": "tiny", "data_dir": str(tmp_path), "columns": {"x": column}}
  whole = evaluated(open_data(section).train, 6)["x"]
  np.testing.assert_allclose(whole[0], tone(100, 8000)[10:90], atol=1e-4)


# Texts and pictures alone.


def test_pairs_of_texts(tfds_data_dir):
  text = {"kind": "text", "tokenizer": "words", "length": 24}
  section = {"source": "stsb", "data_dir": tfds_data_dir, "train_split": "train[:90]"}
  section["columns"] = {
    "query": text | {"field": "sentence1"},
    "passage": {"kind": "text", "field": "sentence2", "same_as": "query", "length": 20},
    "score": {"kind": "array"},
  }
  memory, stream = both_of(section)
  trained, whole = check_both(memory, stream)
  assert trained["passage"].shape == (56, 20)
  made = memory.columns["query"].tokenizer
  for name in ("query", "passage"):
    said, index = stream.train.texts(name)
    np.testing.assert_array_equal(index, np.arange(90))
    length = memory.spec[name].shape[0]
    ids = made.encode(said)[0][:, :length]
    np.testing.assert_array_equal(whole[name][:90, : length - 1], ids[:, : length - 1])
  assert {"data/truncated_query", "data/truncated_passage"} == memory.metrics.keys()
  assert memory.facts.splitlines()[1].startswith("passage: captions: ")
  # A vocabulary that both share is learned from both.
  words = {w for name in ("query", "passage") for s in stream.train.texts(name)[0]
           for w in s.lower().split() if w.isalpha()}  # fmt: skip
  unknown = [w for w in words if made.encode([w])[0][0, 1] == 1]
  assert not unknown


def test_tokenizers_in_a_workdir(tmp_path):
  words = [f"a{i} b{i % 3} c" for i in range(20)]
  text = {"kind": "text", "field": "text", "tokenizer": "words", "length": 6}
  section = {"columns": {"text": text, "other": text | {"length": 5}}}
  source = source_of(text=words, other=words[::-1])
  made = open_data(section, workdir=tmp_path, source=source)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer", "tokenizer-other"]
  less = source_of(text=words[:3], other=words[:3])
  again = open_data(section, workdir=tmp_path, started=True, source=less)
  assert again.saved == made.saved != {}
  assert open_data(section, source=less).saved != made.saved
  assert again.limits == made.limits
  assert json.loads(json.dumps(made.saved)) == made.saved
  section = {"columns": {"text": text, "other": text | {"length": 7}}}
  with pytest.raises(ValueError, match="data.columns.other.length is 7, but the tok"):
    open_data(section, workdir=tmp_path, started=True, source=less)


# The section.


@pytest.mark.parametrize(
  ("section", "said"),
  [
    ({"sourse": "shapes"}, "no key 'sourse' in data; did you mean 'source'"),
    ({"views": 2}, "no key 'views' in data"),
    (
      {"columns": {"x": {"kind": "video"}}},
      "data.columns.x.kind is 'video'; there are",
    ),
    ({"columns": {"x": {}}}, "data.columns.x.kind is 'x'"),
    ({"columns": {"text": {"length": 4}}}, "data.columns.text needs tokenizer"),
    ({"columns": {"text": {"tokenizer": "words"}}}, "data.columns.text needs length"),
    ({"columns": {"image": {}}}, "image.size is 0; it is in pixels; without it an en"),
    ({"columns": {"id": {"kind": "array"}}}, "data.columns.id: a column cannot"),
    ({"columns": {"image": {"size": "x"}}}, "data.columns.image.size is 'x'"),
  ],
)
def test_what_is_wrong_in_a_section(section, said):
  source = source_of(text=["a"] * 9, image=[b""] * 9)
  with pytest.raises(ValueError, match=said):
    open_data(section, source=source)


def test_a_spec_without_the_data():
  text = {"tokenizer": "words", "length": 12}
  other = {"kind": "text", "same_as": "text", "field": "title"}
  found = {"text": text, "other": other, "label": {}, "image": {}}
  views = {
    "image": {"name": "views", "size": 24, "views": 2},
    "crops": {"name": "views", "of": "image", "size": 8, "views": 6},
  }
  section = {"source": "no_such_set", "columns": found, "augment": views}
  spec = expected_spec(section)
  assert {key: like.shape for key, like in spec.items()} == {
    "index": (),
    "text": (12,),
    "text_mask": (12,),
    "other": (12,),
    "other_mask": (12,),
    "label": (),
    "image": (2, 24, 24, 3),
    "crops": (6, 8, 8, 3),
  }
  section["columns"]["image"] = {"memory_size": 40}
  assert expected_spec(section)["image"] == ((40, 40, 3), np.uint8)
  # Only the data know what a row of an array is.
  section["columns"]["ids"] = {"kind": "array", "length": 4}
  with pytest.raises(DataError, match="no_such_set"):
    expected_spec(section)
  embedded = {"source": "shapes", "augment": views}
  assert expected_spec(embedded) == open_data(embedded).spec


def test_another_data_set_for_an_evaluation():
  text = {"field": "caption", "tokenizer": "words", "length": 16}
  views = {"image": {"name": "views", "size": 24, "views": 2}}
  columns_ = {"image": {"eval_crop": 1.0}, "text": text, "label": {}}
  section = {"source": "shapes/compositions", "columns": columns_, "augment": views}
  data = open_data(section)
  other = data.other({"source": "shapes"})
  assert other is data.other({"source": "shapes"})
  # Without its captions' field, there is no text: fields are not the run's.
  assert set(other.columns) == {"image", "label"}
  assert len(other.train.classes["label"]) == 9
  assert evaluated(other.test, 600)["image"].shape == (1800, 1, 24, 24, 3)
  other = data.other({"source": "shapes", "columns": {"text": {"field": "caption"}}})
  assert other.columns["text"].tokenizer is data.columns["text"].tokenizer
  with pytest.raises(DataError, match="no field 'title'"):
    data.other({"source": "shapes", "columns": {"text": {"field": "title"}}})


def test_constants():
  source = source_of(x=[1, 2, 3])
  edges = np.arange(6).reshape(3, 2)
  whole = Source("g", 3, ("x",), source.reader, constants={"edges": edges})
  data = open_data({"columns": {"x": {"kind": "array"}}}, source=whole)
  assert data.constants.keys() == {"edges"}
  np.testing.assert_array_equal(data.constants["edges"], edges)
  assert "edges" not in data.spec


# The same from files of every kind.


def sounds_in(kind, root):
  """Six sounds with a class and two numbers, as files of a kind; a section's source."""
  import tarfile

  import pyarrow
  from pyarrow import csv, parquet

  from tests.files_test import add

  data = [flac(tone(100 + i, 8000), 8000) for i in range(6)]
  names, numbers = ["low", "high"] * 3, [[i, i + 0.5] for i in range(6)]
  for i, (name, sound) in enumerate(zip(names, data)):
    if kind in ("folder", "csv"):
      folder = root / name if kind == "folder" else root
      folder.mkdir(exist_ok=True)
      (folder / f"{i}.flac").write_bytes(sound)
  if kind == "folder":
    return f"folder:{root}"
  if kind == "webdataset":
    with tarfile.open(root / "x.tar", "w") as shard:
      for i, sound in enumerate(data):
        add(shard, f"{i}.flac", sound)
        described = {"label": names[i], "numbers": numbers[i]}
        add(shard, f"{i}.json", json.dumps(described).encode())
    return f"webdataset:{root}/x.tar"
  if kind == "csv":
    column = [f"{i}.flac" for i in range(6)]
    numbers = [json.dumps(x) for x in numbers]
  else:
    column = [{"bytes": x, "path": None} for x in data]
  table = pyarrow.table({"audio": column, "label": names, "numbers": numbers})
  write = csv.write_csv if kind == "csv" else parquet.write_table
  write(table, root / f"x.{kind}")
  return f"{kind}:{root}/x.{kind}"


@pytest.mark.parametrize("kind", ["folder", "csv", "parquet", "webdataset"])
def test_sounds_and_numbers_in_files(tmp_path, kind):
  audio = {"kind": "audio", "rate": 8000, "seconds": 0.0125}
  found = {"audio": audio, "label": {}}
  if kind != "folder":
    found["numbers"] = {"kind": "array"}
  section = {"source": sounds_in(kind, tmp_path), "columns": found}
  split = open_data(section).train
  whole = evaluated(split, 6)
  order_ = [1, 3, 5, 0, 2, 4] if kind == "folder" else range(6)  # high, then low
  np.testing.assert_array_equal(whole["label"], [1 - i % 2 for i in order_])
  assert split.classes["label"] == ("high", "low")
  for row, i in enumerate(order_):
    middle = tone(100 + i, 8000)[i // 2 :][:100]
    np.testing.assert_allclose(whole["audio"][row], middle, atol=1e-4)
    if kind != "folder":
      np.testing.assert_array_equal(whole["numbers"][row], np.float32([i, i + 0.5]))
