"""Captions in batches: from memory and streamed, one of several, none missing."""

import numpy as np
import pytest

from clj.data import DataError, Source, open_data
from clj.data.order import order
from clj.data.shapes import COLORS, COMPOSITIONS, SHAPES, UNSEEN, compositions
from tests.data_test import (
  WHOLE,
  assert_same,
  encode,
  evaluated,
  joined,
  one_view,
  opened,
  photograph,
  take,
)

WORDS = ("zero", "one", "two", "three", "four", "five")


def source_of(captions, broken=()):
  """Streams pictures with these captions; the `broken` ones are no pictures."""
  data = [encode(photograph(12, 12, seed=i)) for i in range(len(captions))]
  make = {
    "image": lambda i: b"broken" if i in broken else data[i],
    "label": lambda i: i % 3,
    "text": lambda i: captions[i],
    "other": lambda i: captions[i],
  }

  def read(indices, columns):
    return [{"__key__": str(i)} | {c: make[c](i) for c in columns} for i in indices]

  names = {"label": ("a", "b", "c")}
  return Source("made", len(captions), tuple(make), read, class_names=names)


def data_of(captions, broken=(), *, memory_size=0, **kwargs):
  columns = {
    "image": {"memory_size": memory_size},
    "text": {"tokenizer": "words", "length": 6},
    "label": {},
  }
  views = {"image": {"name": "views", "size": 12, **WHOLE}}
  section = {"columns": columns, "augment": views} | kwargs
  return open_data(section, source=source_of(captions, broken))


@pytest.fixture(scope="module")
def pair():
  """The same forty records with one to four captions, streamed and in memory."""
  captions = [
    [f"{WORDS[i % 5]} {WORDS[i // 5 % 6]} {WORDS[j]}" for j in range(1 + i % 4)]
    for i in range(40)
  ]
  return data_of(captions), data_of(captions, memory_size=12), captions


def test_memory_and_stream_agree(pair):
  stream, memory, captions = pair
  tokenizer = memory.columns["text"].tokenizer
  assert (stream.train.held is None, memory.train.held is None) == (True, False)
  streamed, gathered = one_view(joined(take(stream, 9))), joined(take(memory, 9))
  assert_same(streamed, gathered)
  assert gathered["text"].dtype == np.int32
  assert gathered["text_mask"].dtype == bool
  said = [tokenizer.decode(row) for row in gathered["text"]]
  assert all(c in captions[i] for c, i in zip(said, gathered["index"]))
  found = [evaluated(each.train) for each in (stream, memory)]
  assert_same(*found)
  firsts = tokenizer.encode([c[0] for c in captions])[0]
  np.testing.assert_array_equal(found[0]["text"][:40], firsts)
  assert not found[0]["text_mask"][40:].any()
  np.testing.assert_array_equal(found[0]["text"][40:], tokenizer.pad_id)


def test_each_caption_is_drawn_as_often(pair):
  _, memory, captions = pair
  counts = {}
  for batch in take(memory, 1500, batch_size=40):
    for i, row in zip(batch["index"], batch["text"]):
      counts.setdefault(i, {}).setdefault(row[:5].tobytes(), 0)
      counts[i][row[:5].tobytes()] += 1
  for i, found in counts.items():
    assert len(found) == len(captions[i])
    np.testing.assert_allclose(
      list(found.values()), 1500 / len(found), atol=5 * 1500**0.5 / 2
    )


@pytest.mark.parametrize("memory_size", [0, 12])
def test_two_columns_of_one_field_draw_two_captions(pair, memory_size):
  captions = pair[2]
  columns = {
    "image": {"memory_size": memory_size},
    "text": {"field": "text", "tokenizer": "words", "length": 6},
    "other": {"kind": "text", "field": "text", "same_as": "text", "length": 5},
  }
  data = data_of(captions, columns=columns)
  assert data.columns["other"].tokenizer.same_ids(data.columns["text"].tokenizer)
  assert data.spec["other"].shape == (5,)
  drawn = joined(take(data, 300))
  alone = joined(take(pair[memory_size > 0], 300))
  np.testing.assert_array_equal(drawn["text"], alone["text"])
  pairs = {}
  for i, a, b in zip(drawn["index"], drawn["text"], drawn["other"]):
    pairs.setdefault(int(i), set()).add((a[:5].tobytes(), b.tobytes()))
  for i, found in pairs.items():
    count = len(captions[i])
    # Every pair of two, and none of a caption with itself but where there is one alone.
    assert len(found) == max(1, count * (count - 1))
    assert all(a != b for a, b in found) == (count > 1)


@pytest.mark.parametrize("kind", [0, 1])
def test_rows_and_restarts_change_nothing(pair, kind):
  data = pair[kind]
  whole = take(data, 5)
  threaded = data_of(pair[2], memory_size=12 * kind, threads=1)
  assert_same(joined(take(threaded, 5)), joined(whole))
  assert_same(joined(take(data, 2, step=3)), joined(whole[3:]))
  halves = [take(data, 5, rows=rows) for rows in ((0, 5), (5, 16))]
  for batch, low, high in zip(whole, *halves):
    assert_same(joined([low, high]), batch)
  other = take(data, 1, seed=1)[0]
  assert not np.array_equal(other["text"], whole[0]["text"])


@pytest.mark.parametrize("kind", [0, 1])
def test_every_caption_once_for_evaluation(pair, kind):
  data, captions = pair[kind], pair[2]
  tokenizer = data.columns["text"].tokenizer
  each = lambda **kwargs: data.train.batches(batch_size=16, each="text", **kwargs)
  batches = list(each())
  assert {b["text"].shape for b in batches} == {(16, 6)}
  whole = joined(batches)
  kept = whole["index"] >= 0
  expected = [(i, c) for i, each in enumerate(captions) for c in each]
  np.testing.assert_array_equal(whole["index"][kept], [i for i, _ in expected])
  said, index = data.train.texts("text")
  assert list(zip(index, said)) == expected
  ids, mask, _ = tokenizer.encode([c for _, c in expected])
  np.testing.assert_array_equal(whole["text"][kept], ids)
  np.testing.assert_array_equal(whole["text_mask"][kept], mask)
  assert not whole["text_mask"][~kept].any()
  parts = [each(rows=rows) for rows in ((0, 8), (8, 16))]
  for batch, low, high in zip(batches, *parts):
    assert_same(joined([low, high]), batch)


def test_records_without_caption_or_picture_are_replaced():
  captions = [[f"{WORDS[i % 6]}"] for i in range(30)]
  captions[7] = [" "]
  stream, memory = (data_of(captions, {11}, memory_size=m) for m in (0, 12))
  assert_same(one_view(joined(take(stream, 4))), joined(take(memory, 4)))
  assert stream.train.bad.keys() == memory.train.bad.keys() == {7, 11}
  assert stream.train.bad[7] == "it has no text"
  batch = take(memory, 1, batch_size=30)[0]
  assert not {7, 11} & set(batch["index"].tolist())
  tokenizer = memory.columns["text"].tokenizer
  np.testing.assert_array_equal(
    tokenizer.encode([captions[i][0] for i in batch["index"]])[0], batch["text"]
  )
  # Of a stream nobody has looked at the pictures yet.
  for data, without in ((data_of(captions, {11}), {7}), (memory, {7, 11})):
    found = evaluated(data.train, each="text")["index"]
    assert set(found[found >= 0].tolist()) == set(range(30)) - without


def test_captions_that_are_cut_are_counted(pair):
  captions = pair[2]
  for memory_size, whole in ((0, pair[0]), (12, pair[1])):
    columns = {
      "image": {"memory_size": memory_size},
      "text": {"tokenizer": "words", "length": 4},
    }
    data = data_of(captions, columns=columns)
    assert data.metrics == {"data/truncated_captions": 1}
    said = "captions: 10 ids (words), 4 a caption, 100.0% of the captions are cut"
    assert data.facts == said
    assert whole.metrics == {"data/truncated_captions": 0}


def test_a_vocabulary_is_learned_from_a_sample(pair):
  stream, memory, captions = pair
  source = stream.train.source
  assert list(source.values("text")) == list(enumerate(captions))
  chosen = np.sort(order(0, np.arange(5), 40))
  sample = list(source.values("text", limit=5))
  assert sample == [(i, captions[i]) for i in chosen]
  assert list(memory.train.source.values("text", limit=5)) == sample


# Sources.


def test_compositions_are_held_out():
  splits = {name: compositions(name) for name in ("train", "test", "seen")}
  unseen = {shape * len(COLORS) + color for shape, color in enumerate(UNSEEN)}
  assert len(unseen) * 8 == len(COMPOSITIONS)
  assert set(UNSEEN) == set(range(len(COLORS)))
  counts = {
    name: np.bincount(s["label"], minlength=len(COMPOSITIONS))
    for name, s in splits.items()
  }
  for name in ("train", "seen"):
    assert set(np.flatnonzero(counts[name] == 0)) == unseen
  assert set(np.flatnonzero(counts["test"])) == unseen
  assert all(np.ptp(c[c > 0]) <= 1 for c in counts.values())
  for drawn in splits.values():
    for i in range(0, 300, 7):
      color, shape = COMPOSITIONS[drawn["label"][i]].split()
      assert (SHAPES.index(shape), list(COLORS).index(color)) == divmod(
        drawn["label"][i], len(COLORS)
      )[:1] + (drawn["color"][i],)
      assert all(color in c and shape in c for c in drawn["caption"][i])
      size, *_ = drawn["caption"][i][0].removeprefix("a ").split()
      assert all(size in c for c in drawn["caption"][i][2:])
  assert {len(c) for c in splits["train"]["caption"]} == {4}
  assert {len(c) for c in splits["test"]["caption"]} == {1}
  # Not the same pictures under another name.
  pictures = [{x.tobytes() for x in s["image"]} for s in splits.values()]
  assert not pictures[0] & pictures[2]


def test_the_embedded_sources():
  text_column = {"text": {"field": "caption", "tokenizer": "words", "length": 16}}
  columns = {"image": {}, "label": {}, **text_column}
  data = opened("shapes/compositions", "seen[:50]+test[:30]", columns=columns)
  said, index = data.train.texts("text")
  assert data.train.classes["label"] == COMPOSITIONS
  assert len(data.train) == len(said) == 80
  assert index.tolist() == list(range(80))
  assert said[:1] == compositions("seen")["caption"][0]
  plain = opened("shapes", "test[:20]", columns=columns).train
  assert len(plain.texts("text")[0]) == 20
  with pytest.raises(DataError, match="has no column 'text' of texts"):
    opened("shapes", "test[:20]").train.texts("text")
  columns = {"image": {}, "text": {"field": "title", "tokenizer": "words", "length": 9}}
  said = r"no field 'title' \(data.columns.text.field\); it has: image, label"
  with pytest.raises(DataError, match=said):
    opened("shapes", "train", columns=columns)
  numbers = {"extent": {"kind": "array"}, "center": {"kind": "array"}}
  found = evaluated(opened("shapes", "test[:40]", columns=numbers).train, 40)
  assert (found["extent"].shape, found["center"].shape) == ((40,), (40, 2))


def fashion(tfds_data_dir, image=None, **changes):
  columns = {
    "image": {"memory_size": 24} | (image or {}),
    "text": {"field": "caption", "tokenizer": "words", "length": 12},
    "label": {"field": "article_type"},
  }
  columns = {name: columns[name] | changes.get(name, {}) for name in columns}
  views = {"image": {"name": "views", "size": 24, **WHOLE}}
  return open_data(
    {
      "source": "fashion_product_pairs",
      "train_split": "train[:120]",
      "test_split": "test[:40]",
      "data_dir": tfds_data_dir,
      "columns": columns,
      "augment": views,
    }
  )


def test_fields_of_a_tfds_set(tfds_data_dir):
  data = fashion(tfds_data_dir)
  train, test = data.train, data.test
  batch = evaluated(train, 120)
  assert train.held.arrays["image"].shape == (120, 24, 24, 3)
  assert train.classes["label"] == tuple(sorted(set(train.classes["label"])))
  assert batch["label"].min() == 0
  assert batch["label"].max() == len(train.classes["label"]) - 1
  assert test.classes == train.classes
  assert test.keys == ("index", "image", "text", "text_mask", "label")
  # A class that training does not have is none.
  stream = fashion(tfds_data_dir, image={"memory_size": 0}).test
  assert (stream.held is None, test.held is None) == (True, False)
  types = [record["label"] for record in stream.records(range(40))]
  np.testing.assert_array_equal(types, test.labels())
  assert min(types) == -1
  got, want = (evaluated(s, 20) for s in (stream, test))
  for key in ("index", "label", "text", "text_mask"):
    np.testing.assert_array_equal(got[key], want[key])


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (
      {"label": {"field": "kind"}},
      r"no feature 'kind' that has classes \(data.columns.label.field\); it has: art",
    ),
    ({"image": {"field": "caption"}}, "no feature 'caption' that is an image"),
    ({"text": {"field": "image"}}, "no feature 'image' that is text"),
    ({"text": {"field": "titles"}}, "no feature 'titles' that is text"),
    (
      {"image": {"memory_size": 20_000}},
      "data.columns.image.memory_size takes 134.1 GiB of 2.0: lower it",
    ),
    ({"image": {"memory_sise": 9}}, "no key 'memory_sise' in data.columns.image; did"),
    ({"text": {"kind": "texts"}}, "kind is 'texts'; did you mean 'text'"),
    ({"text": {"length": 2}}, "data.columns.text.length is 2; start, end and one"),
    ({"text": {"same_as": "label"}}, "same_as is 'label', which is no column of texts"),
  ],
)
def test_what_a_tfds_set_lacks(tfds_data_dir, changes, said):
  with pytest.raises(ValueError, match=said):
    take(fashion(tfds_data_dir, **changes), 1)


def test_several_captions_of_a_tfds_set(tfds_data_dir):
  # A set without pictures, but with five captions a record.
  columns = {
    "text": {"field": "captions", "tokenizer": "words", "length": 20},
    "other": {"kind": "text", "field": "captions", "same_as": "text"},
  }
  section = {"source": "multi30k_captions", "data_dir": tfds_data_dir}
  section |= {"columns": columns, "train_split": "test[:100]"}
  memory, stream = (open_data(section, memory_limit=m) for m in (1 << 30, 0))
  assert (stream.train.held is None, memory.train.held is None) == (True, False)
  said, index = memory.train.texts("text")
  np.testing.assert_array_equal(index, np.repeat(np.arange(100), 5))
  assert len(set(said)) > 490
  batch = joined(take(memory, 20))
  assert_same(joined(take(stream, 20)), batch)
  assert (batch["text"] != batch["other"]).any(1).all()
  assert_same(evaluated(stream.train), evaluated(memory.train))
