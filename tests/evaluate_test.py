"""The model at work: what evaluations share, data of their own, what cannot be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clj
from clj import sharding
from clj.data import open_data
from clj.evals import embedder as at_work
from clj.evals.accuracy import accuracy
from clj.evals.measure import best_metric, make_evaluate, table

VIEWS = {"name": "views", "size": 32, "views": 2, "crop_scale": (0.9, 1.0)}
DATA = {
  "source": "shapes/compositions",
  "train_split": "train[:100]",
  "test_split": "test[:90]",
  "columns": {
    "image": {"kind": "image"},
    "text": {"kind": "text", "field": "caption", "tokenizer": "words", "length": 16},
    "label": {"kind": "label"},
  },
}


@functools.cache
def opened():
  return open_data(DATA)


def by_words(words, seen=None):
  """An `embed` without training: texts by their words, pictures by their colours."""

  def embed(params, extra, batch):
    del extra
    found = {}
    if seen is not None:
      seen.append(sorted(batch))
    if "text" in batch:
      counts = jax.nn.one_hot(batch["text"], words) * batch["text_mask"][..., None]
      found["text"] = counts.sum(1) @ params
    if "image" in batch:
      x = batch["image"][:, 0].mean((1, 2))
      found["features"] = found["image"] = jnp.concatenate([x, x**2], 1) @ params[:6]
      found["logits"] = jnp.pad(found["image"], ((0, 0), (0, 64)))
    return found

  return embed


def weights(data):
  return jax.random.normal(jax.random.key(0), (data.limits["text"], 8))


def evaluation(evals, data=None, **options):
  data = data or opened()
  embed = by_words(opened().limits["text"])
  evaluate = make_evaluate(embed, None, data, evals=evals, batch_size=16, **options)
  params = weights(opened())
  return lambda step, final=True, **kwargs: evaluate(params, {}, step, final, **kwargs)


def on(devices, fsdp=1):
  return jax.set_mesh(sharding.make_mesh(-1, fsdp, jax.devices()[:devices]))


def test_evaluations_have_data_of_their_own():
  evals = {
    "zeroshot": {"templates": ("a {}",)},
    "seen": {"name": "zeroshot", "data": {"source": DATA["source"],
                                          "test_split": "seen[:50]"}},
    "shapes": {"name": "zeroshot", "data": {"source": "shapes",
                                            "test_split": "test[:60]"}},
    "retrieval": {},
    "retrieval_train": {"name": "retrieval", "data": {
      "source": DATA["source"], "test_split": "train[:40]",
      "columns": {"text": {"field": "caption"}}}},
    "knn": {"k": 5, "data": {"source": "shapes", "train_split": "test[:200]",
                             "test_split": "test[:40]"}},
    "linear_probe": {"final_only": True, "epochs": 2},
    "accuracy": {},
  }  # fmt: skip
  results = []
  for devices in (1, 8):
    with on(devices):
      results.append(evaluation(evals)(0, final=False))
  one, eight = results
  assert one.keys() == eight.keys()
  for key in one:
    assert one[key] == pytest.approx(eight[key], abs=1e-6), key
  assert one["eval/zeroshot/chance"] == one["eval/seen/chance"] == 1 / 72
  assert one["eval/shapes/chance"] == one["eval/knn/chance"] == 1 / 9
  labels = open_data({"source": "shapes"}).split("test[:40]").labels()
  assert one["eval/knn/most_frequent"] == np.bincount(labels).max() / 40 > 1 / 9
  assert one["eval/retrieval/text_to_image/untrained@10"] == pytest.approx(
    one["eval/retrieval/text_to_image/recall@10"]
  )
  # Four captions a picture, and one right picture a caption.
  assert one["eval/retrieval_train/text_to_image/chance@10"] == pytest.approx(10 / 40)
  assert one["eval/retrieval_train/image_to_text/chance@1"] == pytest.approx(4 / 160)
  assert "eval/knn/raw_pixels" in one and "eval/linear_probe/top1" not in one
  records = {key: one[key] for key in one if key.endswith("/records")}
  assert records["eval/seen/records"] == 50 and records["eval/zeroshot/records"] == 90


def test_what_evaluations_share_is_embedded_once(monkeypatch):
  passes, other = [], {"source": "shapes", "test_split": "test[:80]"}
  batches = at_work._Batches.__call__

  def counted(self, split, names, *args, **kwargs):
    passes.append((split.name, tuple(names)))
    return batches(self, split, names, *args, **kwargs)

  monkeypatch.setattr(at_work._Batches, "__call__", counted)
  evals = {
    "accuracy": {"data": other},
    "zeroshot": {"templates": ("a {}",), "data": dict(other)},
    "diagnostics": {"layer": "features"},
    "retrieval": {},
    "linear_probe": {"epochs": 1},
  }
  with on(2):
    evaluation(evals)(1)
  assert sorted(passes) == [
    ("shapes test[:80]", ("image",)),
    ("shapes/compositions test[:90]", ("image",)),
    ("shapes/compositions test[:90]", ("text",)),
    ("shapes/compositions train[:100]", ("image",)),
  ]


def test_rows_are_those_of_the_records_however_many_batches(monkeypatch):
  monkeypatch.setattr(at_work, "AT_LEAST", 8)
  data, params = opened(), weights(opened())
  embed = by_words(data.limits["text"])
  with on(4):
    model = at_work.make_embedder(
      at_work.programs(embed), params, {}, data, batch_size=8
    )
    rows = model.rows("test", ("features", "image"))
    streamed = list(model.stream("test", ("image", "text")))
  assert sorted(rows) == ["features", "image", "index", "label"]
  assert len(rows["index"]) == 96 and len(rows["image"].sharding.device_set) == 4
  index = np.asarray(rows["index"])
  assert sorted(index[index >= 0]) == list(range(90))
  batch = next(data.test.batches(batch_size=90))
  expected = embed(params, {}, {"image": batch["image"] / np.float32(255)})["image"]
  for i, z, label in zip(index, np.asarray(rows["image"]), np.asarray(rows["label"])):
    if i >= 0:
      np.testing.assert_allclose(z, expected[i], atol=1e-4)
    assert label == (batch["label"][i] if i >= 0 else -1)
  assert len(streamed) == 12 and sorted(streamed[0]) == [
    *("image", "index", "label", "text"),
  ]
  inorder = np.concatenate([x["index"] for x in streamed])
  assert inorder.tolist() == [*range(90), *[-1] * 6]
  compiled = at_work._put._cache_size()
  with on(4):  # the number of batches changes no program but that of the room
    many = [{"z": jnp.ones((8, 2))} for _ in range(50)]
    found = at_work._collect(iter(many), 50)
  assert found["z"].shape == (400, 2) and at_work._put._cache_size() == compiled + 1


def test_every_text_of_a_record_has_a_row_and_its_place():
  data = opened()
  split = data.split("train[:30]")
  with on(8):
    model = at_work.make_embedder(
      at_work.programs(by_words(data.limits["text"])), weights(data), {}, data,
      batch_size=16,
    )  # fmt: skip
    rows = jax.device_get(model.rows(split, ("text",), each="text"))
    said, records = split.texts("text")
    again = model.texts(said, ("text",))["text"]
  assert len(said) == 120
  for z, place, index in zip(rows["text"], rows["place"], rows["index"]):
    if index >= 0:
      assert records[place] == index
      np.testing.assert_allclose(z, again[place], atol=1e-5)
  assert (rows["index"] >= 0).sum() == 120


def test_views_are_those_of_training():
  augment = lambda rng, batch: (
    batch | {"image": jnp.stack([batch["image"] / 255] * 3, axis=1)}
  )
  data = opened()
  with on(2):
    model = at_work.make_embedder(
      at_work.programs(by_words(data.limits["text"]), augment), weights(data), {}, data,
      batch_size=16,
    )  # fmt: skip
    views = model.views("test", ("features",), 33)
    rows = model.rows("test", ("features",))
    assert model.views("test", ("text",), 33) == []
  assert [v["features"].shape for v in views] == [(33, 8)] * 3
  order = np.argsort(np.where(rows["index"] < 0, 999, rows["index"]))[:33]
  expected = np.asarray(rows["features"])[order]
  np.testing.assert_allclose(views[1]["features"], expected, atol=1e-5)
  with on(2):
    found = evaluation({"diagnostics": {}})(1)
  assert "eval/diagnostics/alignment" not in found


def test_pairs_of_texts_find_each_other():
  data = open_data(
    DATA | {"columns": {
      name: DATA["columns"]["text"] | {"field": field} for name, field in
      (("text", "caption"), ("first", "caption"))
    } | {"first": {"kind": "text", "field": "caption", "same_as": "text"}}}
  )  # fmt: skip
  options = {
    "query": "text", "bank": "text", "query_rename": {"first": "text"},
    "data": {"source": DATA["source"], "test_split": "train[:30]", "columns": {
      name: {"field": "caption"} for name in ("text", "first")
    }},
  }  # fmt: skip
  evals = {"retrieval": options}
  with on(2):
    found = evaluation(evals, data)(0)
  assert found["eval/retrieval/first_to_text/recall@10"] > 0.95
  assert best_metric(evals)[0] in found
  assert "eval/retrieval/text_to_first/untrained@10" in found


def test_baselines_are_called_before_where_weights_were_there():
  with on(1):
    run = evaluation({"zeroshot": {}}, start="before")
    first, later = run(0), run(3)
  assert first["eval/zeroshot/before"] == first["eval/zeroshot/top1"]
  assert "eval/zeroshot/before" not in later and "eval/zeroshot/top1" in later


def test_an_evaluation_stops_between_any_two_batches():
  asked = []
  with on(1):
    run = evaluation({"zeroshot": {}, "retrieval": {}})
    assert run(1, stopping=lambda: asked.append(1)) is not None
    assert len(asked) > 3  # pictures, prompts, captions
    for moment in range(len(asked)):
      rest = iter([False] * moment + [True])
      assert run(1, stopping=lambda rest=rest: next(rest)) is None
      assert not list(rest)


@pytest.mark.parametrize(
  ("evals", "line"),
  [
    ({"knn": {}}, r"'knn' needs 'label', and .* leave it out of evals"),
    ({"linear_probe": {}}, "'linear_probe' needs 'label'"),
    ({"accuracy": {}}, "'accuracy' needs 'label'"),
    ({"zeroshot": {}}, "'zeroshot' needs 'label'"),
    ({"retrieval": {"final_only": True}}, "'retrieval': there is no 'text' among"),
    (
      {"diagnostics": {"layer": "patches"}},
      "no 'patches' among .* features, image, logits",
    ),
  ],
)
def test_what_the_data_cannot_give_is_refused_before_training(tmp_path, evals, line):
  from PIL import Image

  for i in range(4):
    Image.fromarray(np.full((32, 32, 3), 50 * i, np.uint8)).save(tmp_path / f"{i}.png")
  data = open_data(
    {
      "source": f"folder:{tmp_path}",
      "test_split": "train",
      "columns": {
        "image": {"kind": "image", "size": 32, "memory_size": 32},
        "label": {"kind": "label"},
      },
    }
  )
  shapes = weights(opened()), {}
  with on(1), pytest.raises(ValueError, match=line) as error:
    evaluation(evals, data, shapes=shapes)
  assert "\n" not in str(error.value)


def test_what_cannot_be_evaluated_is_said_in_a_line():
  for evals, line in (
    ({"zeroshot": {"classnames": "/no/such/file"}}, "classnames /no/such/file"),
    ({"zero": {}}, "no evaluation 'zero'; there are: zeroshot"),
    ({"knn": {"kk": 5}}, "no key 'kk' in evals.knn; did you mean 'k'"),
    ({"retrieval": {"prefix": "trained_"}}, "no key 'prefix' in evals.retrieval"),
  ):
    with on(1), pytest.raises(ValueError, match=line):
      evaluation(evals)(0)


def test_the_best_checkpoint_follows_a_value_that_comes():
  assert best_metric({"diagnostics": {}}) is None
  assert best_metric({"knn": {"final_only": True}}) is None
  evals = {
    "knn20": {"name": "knn", "k": 20},
    "knn": {},
    "retrieval": {"query": "trained_image", "bank": "trained_text", "ks": (1, 5)},
  }
  assert best_metric(evals) == ("eval/retrieval/text_to_image/recall@5", 1)
  del evals["retrieval"]
  assert best_metric(evals) == ("eval/knn/top1", 1)


class Board:
  """A writer that keeps the pictures."""

  def __init__(self):
    self.pictures = []

  def picture(self, name, picture, step):
    self.pictures.append((name, picture, step))


def test_neighbours_are_drawn_once_and_of_pictures_alone():
  data = open_data(DATA | {"test_split": "train[:100]"})
  evals = {
    "knn": {"k": 5, "layer": "features"},
    "knn20": {"name": "knn", "k": 20},
    "text": {"name": "knn", "layer": "text"},
  }
  board = Board()
  with on(2):
    run = evaluation(evals, data)
    run(0, writer=board)
    assert not board.pictures
    run(4, writer=board)
  ((name, picture, step),) = board.pictures
  assert (name, step) == ("neighbours", 4) and picture.dtype == np.uint8
  side = 32 + 2  # with its border
  assert abs(picture.shape[0] - 8 * side) <= 2 and abs(picture.shape[1] - 9 * side) <= 2
  first, second = (picture[2:34, left : left + 32] for left in (2, 36))
  np.testing.assert_array_equal(first, second)  # each is nearest to itself
  assert first.std() > 5


def test_pixels_are_a_baseline_in_memory_alone():
  streamed = open_data(DATA, memory_limit=0)
  with on(2):
    found = evaluation({"knn": {"k": 5}}, streamed)(0)
  assert "eval/knn/raw_pixels" not in found
  assert found["eval/knn/chance"] == 1 / 72 and "eval/knn/untrained" in found


def test_a_table_has_each_protocol_once():
  values = {"eval/knn/top1": 0.5, "eval/knn/chance": 0.1, "eval/knn/records": 90.0}
  lines = table(values, {"knn": {"k": 20}, "zeroshot": {}}).splitlines()
  lines.pop(1)  # dashes
  assert len(lines) == 3
  assert "knn/chance" in lines[1] and "layer features, k 20" in lines[1]
  assert "0.5000" in lines[2] and "layer" not in lines[2]


def test_accuracy_of_logits():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(301, 9)).astype(np.float32)
  labels = rng.integers(-1, 9, 301).astype(np.int32)
  there = labels >= 0
  ranked = np.argsort(-logits[there], axis=1)
  expected = {
    "top1": (ranked[:, 0] == labels[there]).mean(),
    "top5": (ranked[:, :5] == labels[there][:, None]).any(1).mean(),
  }
  for devices in (1, 8):
    with on(devices):
      assert accuracy(logits, labels) == pytest.approx(expected)
  with pytest.raises(ValueError, match="1 rows have a label beyond the 9 classes"):
    accuracy(logits, np.where(np.arange(301) == 5, 9, labels))


def test_parameters_go_in_as_they_lie_and_only_what_is_asked_for_comes_out():
  data, words = opened(), opened().limits["text"]
  params = {"w": jnp.ones((words, 8)), "unused": jnp.ones((16, 8))}

  def embed(params, extra, batch):
    del extra
    z = by_words(words)(params["w"], {}, batch)
    return z | {"other": z["image"] @ params["unused"].T}

  mesh = sharding.make_mesh(1, 8)
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
  params = jax.device_put(params, split)
  with jax.set_mesh(mesh):
    compiled = at_work.programs(embed)
    model = at_work.make_embedder(compiled, params, {}, data, batch_size=16)
    rows = model.rows("test", ("features",))
    assert "other" not in rows
    batch = {"image": jnp.zeros((16, 1, 32, 32, 3), jnp.uint8)}
    text = compiled.embed.lower(params, {}, batch, ("features",)).compile().as_text()
  entry = text[text.index("ENTRY") :]
  assert "all-gather" in text and f"f32[{words},1]" in entry
  assert "f32[16,1]{1,0} parameter" not in entry  # `unused` is not even an argument


@pytest.mark.slow
def test_a_config_is_trained_first(tmp_path, monkeypatch, capsys):
  from clj.train import train
  from configs import lit

  monkeypatch.chdir(lit.__file__.rpartition("/configs/")[0])
  config = lit.get_config("smoke").to_dict() | {
    "init_from": "configs/simclr.py:smoke",
    "init_rename": ((r"^(params|extra)/encoder/(.*)", r"\1/image/\2"),),
    "evals": {},
  }
  assert train(tmp_path, **config) == 0
  out = capsys.readouterr().out
  assert "configs/simclr.py:smoke comes first" in out
  first, second = clj.load(tmp_path / "first"), clj.load(tmp_path)
  for tree in ("params", "extra"):
    before = jax.tree.leaves(getattr(first, tree)["encoder"])
    after = jax.tree.leaves(getattr(second, tree)["image"])
    for x, y in zip(before, after, strict=True):
      np.testing.assert_array_equal(x, y)
  assert train(tmp_path, **config) == 0  # complete: nothing is trained again
  assert "comes first" not in capsys.readouterr().out
  with pytest.raises(ValueError, match=r"there is no file configs/nothing\.py"):
    train(tmp_path / "other", **config | {"init_from": "configs/nothing.py:demo"})
