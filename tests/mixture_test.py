"""Mixtures, balanced batches and shares: which records they give, and when."""

import numpy as np
import pytest

from clj.data import DataError, Source, mixture, open_data
from clj.data.order import order
from tests.columns_test import source_of
from tests.data_test import assert_same, joined, take


def numbered(size, start=0):
  return source_of(x=np.arange(start, start + size))


# Mixtures.


@pytest.mark.parametrize(
  ("weights", "slots"),
  [((1, 1), 2), ((3, 1), 4), ((0.7, 0.2, 0.1), 10), ((1, 0.0001), 4096)],
)
def test_every_stretch_has_its_shares(weights, slots):
  sizes = (40, 7, 90)[: len(weights)]
  whole = mixture.mixture([numbered(n) for n in sizes], weights)
  assert len(whole) == sum(sizes)
  records = whole.at(0, np.arange(20 * slots))
  owner = np.searchsorted(np.cumsum(sizes), records, side="right")
  share = np.asarray(weights) / sum(weights)
  for k in range(len(weights)):
    given = np.cumsum(owner == k)
    wanted = share[k] * np.arange(1, len(owner) + 1)
    # Never more than a slot or two from the share, up to the precision of the table.
    assert np.abs(given - wanted).max() <= 2 + len(owner) / mixture._SLOTS


def test_within_a_source_each_record_comes_once_an_epoch():
  sizes = (40, 7)
  whole = mixture.mixture([numbered(n) for n in sizes], (3, 1))
  records = whole.at(5, np.arange(2000))
  first = records[records < 40]
  for epoch in range(len(first) // 40):
    part = first[40 * epoch : 40 * (epoch + 1)]
    np.testing.assert_array_equal(np.sort(part), np.arange(40))
  second = records[records >= 40] - 40
  assert not np.array_equal(first[:40], first[40:80])
  for epoch in range(len(second) // 7):
    np.testing.assert_array_equal(np.sort(second[7 * epoch :][:7]), np.arange(7))
  # A function of the position alone, however far.
  positions = np.array([[0, 7, 99], [100, 250, 10**15]])
  alone = [[int(whole.at(5, np.array([p]))[0]) for p in row] for row in positions]
  np.testing.assert_array_equal(whole.at(5, positions), alone)
  # A mixture may be of mixtures.
  nested = mixture.mixture([whole, numbered(5)], (1, 1))
  found = nested.at(0, np.arange(400))
  np.testing.assert_array_equal(np.bincount(found >= 47), [200, 200])
  assert set(found) == set(range(52))


def test_weights_must_be_above_0():
  with pytest.raises(DataError, match=r"the weights \[1.0, 0.0\] of 2 sources must"):
    mixture.mixture([numbered(3), numbered(4)], (1, 0))


VIEWS = {"image": {"name": "views", "size": 12, "views": 1, "crop_scale": (1, 1)}}
TEXT = {"field": "caption", "tokenizer": "words", "length": 16}


def mixed(limit=2 << 30, **changes):
  """Captioned compositions, three parts in four, and shapes without captions."""
  parts = [
    {"source": "shapes/compositions", "train_split": "train[:300]", "weight": 3},
    {"source": "shapes", "train_split": "train[:100]", "columns": {"text": None}},
  ]
  section = {
    "mixture": parts,
    "columns": {"image": {}, "text": TEXT, "label": {}},
    "augment": VIEWS,
  }
  return open_data(section | changes, memory_limit=limit)


def test_rows_that_lack_a_modality():
  memory, stream = mixed(), mixed(limit=0)
  assert (memory.train.held is None, stream.train.held is None) == (False, True)
  held, streamed = (joined(take(d, 12)) for d in (memory, stream))
  for key in ("index", "text", "text_mask", "text_valid", "label"):
    np.testing.assert_array_equal(held[key], streamed[key])
  assert held.keys() == memory.spec.keys()
  assert memory.spec["text_valid"] == ((), np.bool_)
  assert "image_valid" not in held and "label_valid" not in held
  valid = held["text_valid"]
  np.testing.assert_array_equal(valid, held["index"] < 300)
  assert valid.mean() == 0.75
  assert held["text_mask"][valid].any(1).all()
  assert not held["text_mask"][~valid].any()
  assert held["image"].any((1, 2, 3)).all()
  # Classes go by their names.
  names = memory.train.classes["label"]
  assert len(names) == 72 + 9
  assert {names[i].count(" ") for i in held["label"][valid]} == {1}
  assert {names[i].count(" ") for i in held["label"][~valid]} == {0}
  # Evaluation has the key too; its data are those of the first source.
  batch = next(memory.test.batches(batch_size=8))
  assert batch["text_valid"].all()
  assert len(memory.test) == 1800
  said, index = memory.train.texts("text")
  assert set(index) == set(range(300))


def test_a_mixture_of_one_is_complete():
  alone = mixed(mixture=[{"source": "shapes", "train_split": "train[:50]"}])
  assert "text_valid" not in alone.spec
  assert sorted(joined(take(alone, 1, batch_size=50))["index"]) == list(range(50))


@pytest.mark.parametrize(
  ("part", "said"),
  [
    ({"sourse": "shapes"}, r"no key 'sourse' in data.mixture\[0\]; did you mean 'sou"),
    (
      {"source": "shapes", "columns": {"image": {"field": "x"}}},
      "no field 'x' .data.c",
    ),
    ({"source": "shapes", "columns": {"pic": None}}, r"data.mixture\[0\] .* 'pic'"),
    ({"source": "shapes", "weight": -1}, "must all be above 0"),
  ],
)
def test_what_is_wrong_in_a_mixture(part, said):
  with pytest.raises(ValueError, match=said):
    mixed(mixture=[part])


# Classes.


def classed(labels, **section):
  """A source whose records are numbers, with these labels."""
  source = source_of(x=list(range(len(labels))), label=labels)
  columns = {"x": {"kind": "array"}, "label": {}}
  return open_data({"columns": columns} | section, source=source)


def test_balanced_batches():
  rng = np.random.default_rng(0)
  labels = rng.choice(
    ["a", "b", "c", "d", "e", ""], 300, p=[0.5, 0.2, 0.1, 0.09, 0.01, 0.1]
  )
  labels = labels.tolist()
  data = classed(labels, balanced={"classes": 5, "each": 4})
  batches = take(data, 60, batch_size=20)
  for batch in batches:
    np.testing.assert_array_equal(np.bincount(batch["label"]), [4] * 5)
    groups = batch["label"].reshape(5, 4)
    assert (groups == groups[:, :1]).all()
  whole = joined(batches)
  assert len({tuple(b["label"][::4]) for b in batches}) > 10  # in many orders
  for k in range(5):
    mine = whole["index"][whole["label"] == k]
    members = np.flatnonzero(np.array(labels) == "abcde"[k])
    for epoch in range(len(mine) // len(members)):
      part = mine[len(members) * epoch :][: len(members)]
      np.testing.assert_array_equal(np.sort(part), members)
  later = take(data, 1, step=7, batch_size=20, rows=(3, 9))[0]
  assert_same(later, {key: value[3:9] for key, value in batches[7].items()})
  stream = classed(labels, balanced={"classes": 5, "each": 4})
  stream._limit = 0
  assert stream.train.held is None
  assert_same(joined(take(stream, 5, batch_size=20)), joined(batches[:5]))


@pytest.mark.parametrize(
  ("labels", "balanced", "said"),
  [
    (
      ["a", "b"] * 9,
      {"classes": 2, "each": 4},
      "batch_size is 16; set it to their",
    ),
    (["a", "b"] * 9, {"classes": 3, "each": 4}, "has 2 classes, fewer than data.balan"),
    ([""] * 9, {"classes": 2, "each": 8}, "has no labels: data.balanced needs them"),
    (["a", "b"] * 9, {"clases": 2, "each": 8}, "no key 'clases' in data.balanced; did"),
    (["a", "b"] * 9, {"classes": 2}, "data.balanced needs each"),
  ],
)
def test_what_is_wrong_in_balanced(labels, balanced, said):
  with pytest.raises(ValueError, match=said):
    take(classed(labels, balanced=balanced), 1)


@pytest.mark.parametrize(("share", "counts"), [(0.1, (20, 5, 1)), (0.01, (2, 1, 1))])
def test_a_share_of_each_class(share, counts):
  labels = ["a"] * 200 + ["b"] * 50 + ["c"] * 3
  data = classed(labels, subset=share)
  assert len(data.train) == sum(counts)
  np.testing.assert_array_equal(np.bincount(data.train.labels()), counts)
  again, other = (
    classed(labels, subset=share),
    classed(labels, subset=share, subset_seed=1),
  )
  chosen = [
    joined(list(d.train.batches(batch_size=9)))["x"] for d in (data, again, other)
  ]
  np.testing.assert_array_equal(chosen[0], chosen[1])
  assert not np.array_equal(chosen[0], chosen[2])
  assert (np.diff(chosen[0][: sum(counts)]) > 0).all()
  # An epoch is of the share alone.
  epoch = take(data, 1, batch_size=sum(counts))[0]
  np.testing.assert_array_equal(np.sort(epoch["index"]), np.arange(sum(counts)))
  np.testing.assert_array_equal(epoch["x"], chosen[0][epoch["index"]])
  with pytest.raises(DataError, match=r"data.subset is 1.5; it is a share"):
    classed(labels, subset=1.5).train  # noqa: B018


def test_a_share_without_labels():
  section = {"columns": {"x": {"kind": "array"}}, "subset": 0.25}
  data = open_data(section, source=numbered(40))
  assert len(data.train) == 10


def test_a_share_of_what_is_held():
  data = open_data({"source": "shapes", "subset": 0.1, "augment": VIEWS})
  assert len(data.train) == 450
  np.testing.assert_array_equal(np.bincount(data.train.labels()), [50] * 9)
  batch = take(data, 1, batch_size=450)[0]
  whole = open_data({"source": "shapes", "augment": VIEWS})
  pictures = {p.tobytes() for p in whole.train.held.arrays["image"]}
  assert all(picture.tobytes() in pictures for picture in batch["image"])


def test_nothing_grows_with_the_stream():
  size = 400_000_000
  huge = Source("huge", size, ("x",), lambda *_: [])
  both = mixture.mixture([huge, huge], (1, 1))
  records = both.at(0, 2**60 + np.arange(1000))
  assert len(set(records.tolist())) == 1000
  np.testing.assert_array_equal(np.bincount(records >= size), [500, 500])
  alone = huge.at(3, np.arange(10))
  np.testing.assert_array_equal(alone, order(3, np.arange(10), size))
