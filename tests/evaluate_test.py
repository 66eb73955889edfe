"""The evaluations at work on data of their own, and a run that trains another first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clj
from clj import sharding
from clj.data import sources, text
from clj.evaluate import make_evaluate
from clj.train import train
from configs import lit

DATA = {
  "source": "shapes/compositions",
  "train_split": "train[:100]",
  "test_split": "test[:90]",
  "data_dir": "",
  "text": {"tokenizer": "words", "length": 16},
  "size": 32,
  "views": 1,
}


def opened(data=DATA):
  source = sources.open_config(data, "train_split")
  tokenizer = text.open_tokenizer(
    captions=lambda: sources.captions_of(source), **data["text"]
  )
  return sources.tokenized(source, tokenizer)


def by_words(words):
  """An `embed` without training: texts by their words, pictures by their colours."""

  def embed(params, extra, batch):
    del extra
    found = {}
    if "text" in batch:
      counts = jax.nn.one_hot(batch["text"], words) * batch["text_mask"][..., None]
      found["text"] = counts.sum(1) @ params
    if "image" in batch:
      x = batch["image"][:, 0].mean((1, 2))
      found["features"] = found["image"] = jnp.concatenate([x, x**2], 1) @ params[:6]
    return found

  return embed


def evaluation(evals, source, **options):
  words = source.tokenizer.vocab_size
  params = jax.random.normal(jax.random.key(0), (words, 8))
  evaluate = make_evaluate(
    by_words(words),
    None,
    source,
    data=DATA,
    evals=evals,
    batch_size=16,
    **options,
  )
  return lambda step, final=True, **kwargs: evaluate(params, {}, step, final, **kwargs)


def test_evaluations_have_data_of_their_own():
  source = opened()
  evals = {
    "zeroshot": {"templates": ("a {}",)},
    "seen": {"name": "zeroshot", "data": {"test_split": "seen[:50]"}},
    "shapes": {"name": "zeroshot", "data": {"source": "shapes"}},
    "retrieval": {},
    "retrieval_train": {"name": "retrieval", "data": {"test_split": "train[:40]"}},
    "knn": {"k": 5, "data": {"source": "shapes", "train_split": "test[:200]"}},
    "linear_probe": {"final_only": True, "epochs": 2},
  }
  results = []
  for devices in (1, 8):
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:devices])):
      results.append(evaluation(evals, source)(0, final=False))
  one, eight = results
  assert one.keys() == eight.keys()
  for key in one:
    assert one[key] == pytest.approx(eight[key], abs=1e-6), key
  assert one["eval/zeroshot/chance"] == one["eval/seen/chance"] == 1 / 72
  assert one["eval/shapes/chance"] == 1 / 9
  assert one["eval/retrieval/text_to_image/untrained@10"] == pytest.approx(
    one["eval/retrieval/text_to_image/recall@10"]
  )
  # Four captions a picture, and one right picture a caption.
  assert one["eval/retrieval_train/text_to_image/chance@10"] == pytest.approx(10 / 40)
  assert one["eval/retrieval_train/image_to_text/chance@1"] == pytest.approx(4 / 160)
  assert "eval/knn/raw_pixels" in one and "eval/linear_probe/top1" not in one


def test_baselines_are_called_before_where_weights_were_there():
  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    run = evaluation({"zeroshot": {}}, opened(), start="before")
    first, later = run(0), run(3)
  assert first["eval/zeroshot/before"] == first["eval/zeroshot/top1"]
  assert "eval/zeroshot/before" not in later and "eval/zeroshot/top1" in later


def test_an_evaluation_stops_between_any_two_batches():
  asked = []
  with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
    run = evaluation({"zeroshot": {}, "retrieval": {}}, opened())
    assert run(1, stopping=lambda: asked.append(1)) is not None
    assert len(asked) > 3  # pictures, prompts, captions
    for moment in range(len(asked)):
      rest = iter([False] * moment + [True])
      assert run(1, stopping=lambda rest=rest: next(rest)) is None
      assert not list(rest)


def test_what_cannot_be_evaluated_is_said_in_a_line():
  source = opened()
  plain = dataclasses.replace(source, tokenizer=None)
  with pytest.raises(ValueError, match="'retrieval' needs texts: .* no data.text"):
    make_evaluate(None, None, plain, data=DATA, evals={"retrieval": {}}, batch_size=8)
  missing = evaluation({"zeroshot": {"classnames": "/no/such/file"}}, source)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="classnames /no/such/file"):
    missing(0)
  with pytest.raises(ValueError, match="no evaluation 'zero'; there are: knn"):
    evaluation({"zero": {}}, source)


@pytest.mark.slow
def test_a_config_is_trained_first(tmp_path, monkeypatch, capsys):
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
