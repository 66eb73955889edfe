"""Evaluations against slow NumPy twins, on 1 and 8 devices, and the collapse alarm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from clj.evals import knn as nearest
from clj.evals.diagnostics import diagnostics, warning
from clj.evals.knn import knn
from clj.evals.linear_probe import linear_probe
from clj.evals.segmentation import confusion, scores

CLASSES = 7


def mesh(data, fsdp=1):
  devices = jax.devices()[: data * fsdp]
  axis_types = (AxisType.Auto, AxisType.Auto)
  return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types, devices=devices)


def clusters(count, width=12, noise=2.0, seed=0):
  """Features around a centre a class, and labels of which some are -1."""
  centers = np.random.default_rng(99).normal(size=(CLASSES, width))
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, CLASSES, count)
  features = centers[labels] + noise * rng.normal(size=(count, width))
  labels[rng.random(count) < 0.1] = -1
  return features.astype(np.float32), labels.astype(np.int32)


def slow_knn(train, train_labels, test, test_labels, k, temperature):
  train, train_labels = train[train_labels >= 0], train_labels[train_labels >= 0]
  test, test_labels = test[test_labels >= 0], test_labels[test_labels >= 0]
  train = train / np.linalg.norm(train.astype(np.float64), axis=1, keepdims=True)
  test = test / np.linalg.norm(test.astype(np.float64), axis=1, keepdims=True)
  top1 = top5 = 0
  for row, label in zip(test @ train.T, test_labels, strict=True):
    near = np.argsort(-row, kind="stable")[:k]
    votes = np.zeros(CLASSES)
    np.add.at(votes, train_labels[near], np.exp(row[near] / temperature))
    ranked = np.argsort(-votes, kind="stable")
    top1 += ranked[0] == label
    top5 += label in ranked[:5][votes[ranked[:5]] > 0]
  return {"top1": top1 / len(test), "top5": top5 / len(test)}


@pytest.mark.parametrize(("k", "temperature"), [(3, 0.07), (20, 0.07), (10_000, 0.1)])
def test_knn_is_its_slow_twin_on_any_mesh(k, temperature):
  train, test = clusters(1101, seed=1), clusters(301, seed=2)
  expected = slow_knn(*train, *test, k, temperature)
  assert 0.2 < expected["top1"] < 0.9
  for shape in ((1, 1), (8, 1) if k == 20 else (2, 4)):
    with jax.set_mesh(mesh(*shape)):
      options = {"num_classes": CLASSES, "k": k, "temperature": temperature}
      assert knn(*train, *test, **options) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_class_without_a_vote_is_no_prediction_of_knn(devices):
  classes = np.arange(10)
  point, options = np.ones((10, 4), np.float32), {"num_classes": 10}
  # Each class is one of ten equal neighbours, and one of them is asked.
  with jax.set_mesh(mesh(devices)):
    found = knn(point, classes, point, classes, k=1, **options)
    assert found == {"top1": pytest.approx(0.1), "top5": pytest.approx(0.1)}
    found = knn(point, classes, point, classes, k=3, **options)
    assert found == {"top1": pytest.approx(0.1), "top5": pytest.approx(0.3)}
    # All neighbours are of class 9.
    bank = np.concatenate([np.ones((20, 4)), -np.ones((9, 4))]).astype(np.float32)
    labels = np.concatenate([np.full(20, 9), classes[:9]])
    found = knn(bank, labels, point[:4], classes[:4], k=20, **options)
    assert found == {"top1": 0, "top5": 0}
    found = knn(bank, labels, point, classes, k=20, **options)
    assert found == {"top1": pytest.approx(0.1), "top5": pytest.approx(0.1)}
    # A neighbour votes however far away it is, and low the temperature.
    found = knn(bank, labels, point[:4], classes[:4], k=29, temperature=1e-3, **options)
    assert found == {"top1": 0, "top5": 1}


def test_knn_takes_arrays_on_devices_and_refuses_what_has_no_labels():
  train, test = clusters(64, seed=1), clusters(32, seed=2)
  on_device = [jnp.asarray(x) for x in (*train, *test)]
  found = knn(*on_device, num_classes=CLASSES, k=5)
  assert found == knn(*train, *test, num_classes=CLASSES, k=5)
  with pytest.raises(ValueError, match="no labelled row among the test"):
    knn(*train, test[0], np.full(32, -1), num_classes=CLASSES)
  with pytest.raises(ValueError, match="one width"):
    knn(*train, test[0][:, 1:], test[1], num_classes=CLASSES)


def test_baseline_features():
  images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
  pixels = nearest.raw_pixels(images)
  np.testing.assert_allclose(pixels, images.reshape(3, -1) / 255, atol=1e-7)
  for given in (images, images / np.float32(255)):
    histogram = np.asarray(nearest.color_histogram(given, bins=2))
    bits = (images > 127) @ np.array([4, 2, 1])
    expected = [np.bincount(b.ravel(), minlength=8) / 16 for b in bits]
    np.testing.assert_allclose(histogram, expected, atol=1e-7)


def test_linear_probe_learns_and_does_not_look_at_the_test_rows():
  train, test = clusters(1500, noise=1.0, seed=1), clusters(400, noise=1.0, seed=2)
  train[0][:, 0] *= 1000  # The scale of a feature must not matter.
  test[0][:, 0] *= 1000
  options = {"num_classes": CLASSES, "epochs": 8, "batch_size": 128}
  results = []
  for devices in (1, 8):
    with jax.set_mesh(mesh(devices)):
      rates = (1e-7, 0.03)
      results.append(linear_probe(*train, *test, learning_rates=rates, **options))
  result = results[0]
  assert result["top1"] > 0.75
  assert result["learning_rate"] == 0.03
  assert result["top1"] == result["top1_0.03"] > result["top1_1e-07"]
  assert results[1] == pytest.approx(result, abs=0.01)
  shuffled = np.random.default_rng(0).permutation(test[1])
  other = linear_probe(*train, test[0], shuffled, learning_rates=rates, **options)
  assert other["held_out_top1"] == pytest.approx(result["held_out_top1"], abs=0.01)
  assert other["top1"] < 0.4


def test_diagnostics_of_known_distributions():
  rng = np.random.default_rng(0)
  z = rng.normal(size=(4001, 16)).astype(np.float32)
  labels = np.zeros(4001, np.int32)
  with jax.set_mesh(mesh(8)):
    found = diagnostics(z, (z, 3 * z), labels=labels)
    opposite = diagnostics(z, (z, -z))
  assert found["feature_std"] == pytest.approx(1, abs=0.01)
  assert found["effective_rank"] == pytest.approx(16, rel=0.01)
  unit = z[:1500] / np.linalg.norm(z[:1500], axis=1, keepdims=True)
  kernel = np.exp(-4 * (1 - unit @ unit.T))[~np.eye(1500, dtype=bool)]
  assert found["uniformity"] == pytest.approx(np.log(kernel.mean()), abs=0.01)
  assert found["alignment"] == pytest.approx(0, abs=1e-6)
  assert opposite["alignment"] == pytest.approx(4, abs=1e-5)
  assert not found["collapsed"]
  assert warning(found) == ""
  padded = np.concatenate([z, np.full_like(z, 100.0)])
  labels = np.concatenate([labels, labels - 1])
  assert diagnostics(padded, labels=labels) == pytest.approx(
    diagnostics(z), rel=0.02, abs=0.02
  )


@pytest.mark.parametrize("kind", ["point", "line", "constant"])
def test_diagnostics_say_collapse(kind):
  rng = np.random.default_rng(0)
  noise = rng.normal(size=(600, 32))
  features = {
    "point": 5 * np.ones((1, 32)) + 0.01 * noise,
    "line": rng.normal(size=(600, 1)) * np.ones((1, 32)) + 0.01 * noise,
    "constant": np.ones((600, 32)),
  }[kind]
  found = diagnostics(features.astype(np.float32))
  assert found["collapsed"]
  line = warning(found)
  assert line.startswith("warning: the representation has collapsed")
  assert "\n" not in line


def test_segmentation_of_a_picture():
  """Class 2 is predicted and nowhere, class 3 neither, and 255 does not count."""
  target = np.array([[0, 0, 0, 1], [1, 1, 255, 255]], np.uint8)
  prediction = np.array([[0, 0, 1, 1], [1, 2, 3, 0]], np.uint8)
  matrix = confusion(prediction, target, 4)
  expected = [[2, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
  np.testing.assert_array_equal(matrix, expected)
  found = scores(matrix)
  np.testing.assert_allclose(found["iou"], [2 / 3, 1 / 2, 0, np.nan])
  np.testing.assert_allclose(found["accuracy"], [2 / 3, 2 / 3, np.nan, np.nan])
  np.testing.assert_allclose(found["dice"], [4 / 5, 2 / 3, 0, np.nan])
  assert found["miou"] == pytest.approx((2 / 3 + 1 / 2) / 3)
  assert found["mean_accuracy"] == pytest.approx(2 / 3)
  assert found["mean_dice"] == pytest.approx((4 / 5 + 2 / 3) / 3)
  assert found["pixel_accuracy"] == pytest.approx(4 / 6)
  assert found["fwiou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
  # The parts of a data set add up.
  rows = zip(prediction, target, strict=True)
  np.testing.assert_array_equal(sum(confusion(*row, 4) for row in rows), matrix)
  assert np.isnan(scores(confusion(target, np.full_like(target, 255), 4))["miou"])
  with pytest.raises(ValueError, match="target from 0 to 1, but there are 1 classes"):
    confusion(np.zeros_like(target), target, 1)
  with pytest.raises(ValueError, match="give one shape"):
    confusion(prediction[0], target, 4)
