"""Captions in batches: from memory and streamed, one of several, none missing."""

import numpy as np
import pytest

from clj.data import DataError, open_source, pipeline, sources, text
from clj.data.order import order
from clj.data.shapes import COLORS, COMPOSITIONS, SHAPES, UNSEEN, compositions
from tests.data_test import assert_same, encode, joined, photograph

WHOLE = {"size": 12, "views": 1, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
WORDS = ("zero", "one", "two", "three", "four", "five")


def source_of(captions, broken=()):
  """Streams pictures with these captions; the `broken` ones are no pictures."""
  data = [encode(photograph(12, 12, seed=i)) for i in range(len(captions))]

  def read(indices):
    return [
      {
        "image": b"broken" if i in broken else data[i],
        "label": int(i) % 3,
        "caption": captions[i],
      }
      for i in indices
    ]

  keys = ("index", "image", "label")
  return sources.Source(
    "made", len(captions), keys, ("a", "b", "c"), read=read, captioned=True
  )


@pytest.fixture(scope="module")
def pair():
  """The same forty records with one to four captions, streamed and in memory."""
  captions = [
    [f"{WORDS[i % 5]} {WORDS[i // 5 % 6]} {WORDS[j]}" for j in range(1 + i % 4)]
    for i in range(40)
  ]
  stream = source_of(captions)
  memory = sources.load(source_of(captions), (12, 12))
  tokenizer = text.open_tokenizer(
    "words", length=6, captions=lambda: sources.captions_of(stream)
  )
  made = [sources.tokenized(s, tokenizer) for s in (stream, memory)]
  return *made, tokenizer, captions


def take(source, steps, **kwargs):
  batches = pipeline.batches(source, **{"seed": 0, "batch_size": 16, **WHOLE, **kwargs})
  try:
    return [next(batches) for _ in range(steps)]
  finally:
    batches.close()


def test_memory_and_stream_agree(pair):
  stream, memory, tokenizer, captions = pair
  streamed, gathered = (joined(take(s, 9)) for s in (stream, memory))
  assert_same(streamed, gathered)
  assert gathered["text"].dtype == np.int32
  assert gathered["text_mask"].dtype == bool
  said = [tokenizer.decode(row) for row in gathered["text"]]
  assert all(c in captions[i] for c, i in zip(said, gathered["index"]))
  evaluated = [
    joined(list(pipeline.eval_batches(s, batch_size=16, size=12)))
    for s in (stream, memory)
  ]
  assert_same(*evaluated)
  firsts = tokenizer.encode([c[0] for c in captions])[0]
  np.testing.assert_array_equal(evaluated[0]["text"][:40], firsts)
  assert not evaluated[0]["text_mask"][40:].any()


def test_each_caption_is_drawn_as_often(pair):
  _, memory, tokenizer, captions = pair
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


@pytest.mark.parametrize("kind", [0, 1])
def test_rows_threads_and_restarts_change_nothing(pair, kind):
  source = pair[kind]
  whole = take(source, 5, threads=1)
  assert_same(joined(take(source, 5, threads=3)), joined(whole))
  assert_same(joined(take(source, 2, step=3)), joined(whole[3:]))
  halves = [take(source, 5, rows=rows) for rows in ((0, 5), (5, 16))]
  for batch, low, high in zip(whole, *halves):
    assert_same(joined([low, high]), batch)
  other = take(source, 1, seed=1)[0]
  assert not np.array_equal(other["text"], whole[0]["text"])


@pytest.mark.parametrize("kind", [0, 1])
def test_every_caption_once_for_evaluation(pair, kind):
  source, tokenizer, captions = pair[kind], *pair[2:]
  batches = list(pipeline.caption_batches(source, batch_size=16))
  assert {b["text"].shape for b in batches} == {(16, 6)}
  whole = joined(batches)
  kept = whole["index"] >= 0
  expected = [(i, c) for i, each in enumerate(captions) for c in each]
  np.testing.assert_array_equal(whole["index"][kept], [i for i, _ in expected])
  ids, mask, _ = tokenizer.encode([c for _, c in expected])
  np.testing.assert_array_equal(whole["text"][kept], ids)
  np.testing.assert_array_equal(whole["text_mask"][kept], mask)
  assert not whole["text_mask"][~kept].any()
  parts = [
    pipeline.caption_batches(source, batch_size=16, rows=rows)
    for rows in ((0, 8), (8, 16))
  ]
  for batch, low, high in zip(batches, *parts):
    assert_same(joined([low, high]), batch)


def test_records_without_caption_or_picture_are_replaced():
  captions = [[f"{WORDS[i % 6]}"] for i in range(30)]
  captions[7] = []
  made = [source_of(captions, {11}), sources.load(source_of(captions, {11}), (12, 12))]
  tokenizer = text.open_tokenizer("words", length=4, captions=lambda: WORDS)
  stream, memory = (sources.tokenized(s, tokenizer) for s in made)
  assert_same(joined(take(stream, 4)), joined(take(memory, 4)))
  assert stream.bad.keys() == memory.bad.keys() == {7, 11}
  assert stream.bad[7] == "it has no caption"
  batch = take(memory, 1, batch_size=30)[0]
  assert not {7, 11} & set(batch["index"].tolist())
  np.testing.assert_array_equal(
    tokenizer.encode([captions[i][0] for i in batch["index"]])[0], batch["text"]
  )
  # Of a stream nobody has looked at the pictures yet.
  for source, without in ((stream, {7}), (memory, {7, 11})):
    found = joined(list(pipeline.caption_batches(source, batch_size=16)))["index"]
    assert set(found[found >= 0].tolist()) == set(range(30)) - without


def test_captions_that_are_cut_are_counted(pair):
  stream, memory, *_ = pair
  short = text.open_tokenizer("words", length=4, captions=lambda: WORDS)
  for source in (stream, memory):
    assert sources.tokenized(source, short).truncated == 1
    assert source.truncated == 0


def test_a_vocabulary_is_learned_from_a_sample(pair):
  stream, memory, _, captions = pair
  assert list(sources.captions_of(stream)) == [c for each in captions for c in each]
  chosen = np.sort(order(0, np.arange(5), 40))
  sample = list(sources.captions_of(stream, limit=5))
  assert sample == [c for i in chosen for c in captions[i]]
  assert list(sources.captions_of(memory, limit=5)) == sample


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
  source = open_source("shapes/compositions", "seen[:50]+test[:30]", caption="caption")
  assert source.class_names == COMPOSITIONS
  assert len(source) == len(source.captions) == 80
  assert source.captions[0] == compositions("seen")["caption"][0]
  plain = open_source("shapes", "test[:20]", caption="caption")
  assert all(len(c) == 1 for c in plain.captions)
  assert open_source("shapes", "test[:20]").captions is None
  with pytest.raises(DataError, match="no field 'title' of captions; it has: caption"):
    open_source("shapes", "train", caption="title")
  tokenizer = text.open_tokenizer("words", length=4, captions=lambda: WORDS)
  with pytest.raises(DataError, match="has no captions; leave data.text out"):
    sources.tokenized(open_source("shapes", "test[:20]"), tokenizer)


def fashion(tfds_data_dir, **changes):
  return {
    "source": "fashion_product_pairs",
    "train_split": "train[:120]",
    "test_split": "test[:40]",
    "data_dir": tfds_data_dir,
    "memory_size": 24,
    "fields": {"label": "article_type"},
    "text": {"field": "caption", "tokenizer": "words", "length": 12},
  } | changes


def test_fields_of_a_tfds_set(tfds_data_dir):
  data = fashion(tfds_data_dir)
  train = sources.open_config(data, "train_split")
  assert train.arrays["image"].shape == (120, 24, 24, 3)
  assert train.class_names == tuple(sorted(set(train.class_names)))
  assert train.arrays["label"].min() == 0
  assert train.arrays["label"].max() == len(train.class_names) - 1
  tokenizer = text.open_tokenizer(
    "words", length=12, captions=lambda: sources.captions_of(train)
  )
  train = sources.tokenized(train, tokenizer)
  test = sources.open_config(data, "test_split", train)
  assert test.class_names == train.class_names
  assert test.tokenizer is tokenizer
  assert test.keys == ("index", "image", "label", "text", "text_mask")
  # A class that training does not have is none.
  stream = sources.open_config(data | {"memory_size": 0}, "test_split", train)
  assert stream.arrays is None
  types = [r["label"] for r in stream.read(range(40))]
  np.testing.assert_array_equal(types, test.arrays["label"])
  got, want = (
    joined(list(pipeline.eval_batches(s, batch_size=20, size=24)))
    for s in (stream, test)
  )
  for key in ("index", "label", "text", "text_mask"):
    np.testing.assert_array_equal(got[key], want[key])


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"fields": {"label": "kind"}}, "no feature 'kind' that has classes; it has: art"),
    ({"fields": {"image": "caption"}}, "no feature 'caption' that is an image"),
    ({"text": {"field": "image"}}, "no feature 'image' that is text"),
    ({"text": {"field": "titles"}}, "no feature 'titles' that is text"),
    ({"memory_size": 20_000}, "memory_size 20000 takes 134.1 GiB of 2.0: lower it"),
  ],
)
def test_what_a_tfds_set_lacks(tfds_data_dir, changes, said):
  with pytest.raises(DataError, match=said):
    sources.open_config(fashion(tfds_data_dir, **changes), "train_split")


def test_several_captions_of_a_tfds_set(tfds_data_dir):
  # A set without pictures, but with five captions a record.
  with pytest.raises(DataError, match="no feature 'image' that is an image"):
    open_source("multi30k_captions", "test", tfds_data_dir, caption="captions")
