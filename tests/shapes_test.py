"""`shapes` held to account: only the shape tells the label, and a network sees it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clj.data import DataError, open_data
from clj.data.shapes import COLORS, SHAPES, SIZES, shapes

LIMIT = 0.35  # Chance is 0.11.


@pytest.fixture(scope="module")
def splits():
  return shapes("train"), shapes("test")


def knn_accuracy(train, test, train_label, test_label, k=200, temperature=0.1):
  """Weighted kNN on cosine similarity, as in Wu et al. (2018)."""
  train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
  similarity = test @ train.T
  nearest = np.argpartition(-similarity, k, axis=1)[:, :k]
  weights = np.exp(np.take_along_axis(similarity, nearest, 1) / temperature)
  votes = [(weights * (train_label[nearest] == c)).sum(1) for c in range(len(SHAPES))]
  return (np.argmax(votes, 0) == test_label).mean()


def pixels(split):
  return split["image"].reshape(len(split["image"]), -1).astype(np.float32) / 255


def histogram(split, bins=8):
  levels = (split["image"].astype(int) * bins) >> 8
  cells = levels @ np.array([bins**2, bins, 1])
  rows = [np.bincount(x, minlength=bins**3) for x in cells.reshape(len(cells), -1)]
  return np.stack(rows).astype(np.float32)


@pytest.mark.parametrize("features", [pixels, histogram])
def test_pixels_and_colours_do_not_give_the_shape_away(splits, features):
  train, test = splits
  x, y = features(train), features(test)
  assert knn_accuracy(x, y, train["label"], test["label"]) < LIMIT


def test_a_linear_model_does_not_see_the_shape(splits):
  train, test = splits
  x, y = pixels(train), pixels(test)
  mean = x.mean(0)
  x, y = x - mean, y - mean
  target = np.eye(len(SHAPES), dtype=np.float32)[train["label"]]
  gram, cross = x.T @ x, x.T @ target
  for decay in (1, 100, 10_000):
    weights = np.linalg.solve(gram + decay * np.eye(len(gram), dtype=np.float32), cross)
    assert ((y @ weights).argmax(1) == test["label"]).mean() < LIMIT


def conv(x, weights, stride):
  """A 3x3 convolution as one matrix product: quick to differentiate on a CPU."""
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  side = x.shape[1] - 2
  shifted = [
    x[:, i : i + side : stride, j : j + side : stride]
    for i in range(3)
    for j in range(3)
  ]
  return jnp.concatenate(shifted, -1) @ weights


def network(params, images):
  x = images.astype(jnp.float32) / 255 - 0.5
  for layer, stride in zip(params["convs"], (2, 1, 2, 1)):
    x = conv(x, layer["weights"], stride)
    mean, variance = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
    x = jax.nn.relu(x + layer["bias"][None, None, None])
  return x.max((1, 2)) @ params["weights"]


@pytest.mark.slow
def test_a_small_network_sees_the_shape(splits):
  train, test = splits
  rng = np.random.default_rng(0)
  widths = (3, 16, 32, 32, 64)
  params = {
    "convs": [
      {
        "weights": rng.normal(0, (2 / 9 / a) ** 0.5, (9 * a, b)).astype(np.float32),
        "bias": np.zeros(b, np.float32),
      }
      for a, b in zip(widths, widths[1:])
    ],
    "weights": np.zeros((widths[-1], len(SHAPES)), np.float32),
  }
  steps, batch_size = 400, 128
  tx = optax.adam(optax.cosine_decay_schedule(4e-3, steps))
  state = tx.init(params)

  @jax.jit
  def step(params, state, images, labels):
    def loss(params):
      logits = network(params, images)
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  for i in range(steps):
    rows = rng.integers(0, len(train["label"]), batch_size)
    images = np.rot90(train["image"][rows], i, axes=(1, 2))  # Still the same shapes.
    params, state = step(params, state, images, train["label"][rows])
  predicted = np.asarray(jax.jit(network)(params, test["image"])).argmax(1)
  assert (predicted == test["label"]).mean() > 0.95


def test_train_and_test_are_draws_of_their_own(splits):
  train, test = splits
  draws = [
    {tuple(x) for x in np.column_stack([s["extent"], s["angle"], s["center"]]).tolist()}
    for s in splits
  ]
  assert len(draws[0]) == len(train["label"])
  assert len(draws[1]) == len(test["label"])
  assert not draws[0] & draws[1]
  pictures = [{x.tobytes() for x in s["image"]} for s in splits]
  assert not pictures[0] & pictures[1]


def test_every_shape_is_as_frequent_in_every_colour(splits):
  train, _ = splits
  table = np.zeros((len(SHAPES), len(COLORS)))
  np.add.at(table, (train["label"], train["color"]), 1)
  expected = len(train["label"]) / table.size
  np.testing.assert_allclose(table, expected, atol=6 * expected**0.5)
  assert np.ptp(table.sum(1)) <= 1


def test_a_seed_is_a_data_set():
  a, b, other = shapes("test"), shapes("test"), shapes("test", seed=1)
  assert a.keys() == other.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])
  assert not np.array_equal(a["image"], other["image"])
  assert len(shapes("train", count=7)["image"]) == 7


def test_captions_tell_what_is_drawn(splits):
  train, _ = splits
  colors = list(COLORS)
  for i in range(200):
    caption = train["caption"][i]
    assert SHAPES[train["label"][i]] in caption
    assert colors[train["color"][i]] in caption
    x, y = train["center"][i]
    assert ("left" in caption) == (x < 0.45)
    assert ("right" in caption) == (x >= 0.55)
    assert ("upper" in caption) == (y < 0.45)
    assert ("lower" in caption) == (y >= 0.55)


def test_the_source():
  opened = lambda split: open_data({"source": "shapes", "train_split": split})
  data = opened("train")
  assert len(data.train) == SIZES["train"]
  assert data.train.keys == ("index", "image", "label")
  assert data.train.classes["label"] == SHAPES
  drawn = shapes("train")
  batch = next(data.batches(seed=0, batch_size=100))
  for key in ("image", "label"):
    np.testing.assert_array_equal(batch[key], drawn[key][batch["index"]])
  assert len(opened("test[:10%]").train) == SIZES["test"] // 10
  with pytest.raises(DataError, match="shapes has no split 'dev'"):
    opened("dev")
