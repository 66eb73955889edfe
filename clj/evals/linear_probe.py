"""A linear classifier on frozen features, for many learning rates in one pass.

The published protocols differ mostly in a learning rate tuned to the scale of the
features (0.1 for SimCLR, 30 for MoCo). Here features are standardised, and a grid of
learning rates is trained together, as DINOv2 does (arXiv 2304.07193, section 7): one
matrix product serves all, so the grid costs little more than its largest member.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from clj.cli import UserError
from clj.evals.rows import (
  check_rows,
  check_widths,
  class_count,
  context_mesh,
  shard_rows,
)

GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
BEYOND = np.iinfo(np.int32).max


def linear_probe(
  train_features,
  train_labels,
  test_features,
  test_labels,
  *,
  num_classes: int,
  learning_rates: tuple[float, ...] = GRID,
  epochs: int = 30,
  batch_size: int = 512,
  held_out: float = 0.1,
  seed: int = 0,
) -> dict[str, float]:
  """Test accuracy of logistic regression by SGD; the last epoch counts.

  Nesterov momentum 0.9, cosine to 0, no weight decay, weights from zero. Features are
  standardised by the mean and variance of the training rows (batch norm without scale
  and offset). Rows are shuffled once into batches that every epoch visits in the same
  order, split over the mesh of the context.

  The test rows choose nothing: for each learning rate two classifiers are trained, one
  on all training rows, and its twin without the share `held_out` of them. The rate of
  the twin that is best on the rows held out is the one whose accuracy is "top1".

  Args:
    train_features, test_features: `[N, d]` and `[M, d]`, NumPy or JAX.
    train_labels, test_labels: int `[N]` and `[M]`; rows with label -1 are left out.
    num_classes: labels are below it.
    learning_rates: the grid, as such: not multiplied by the batch size.
    epochs: over the training rows.
    batch_size: rounded up to a multiple of the number of devices.
    held_out: share in (0, 1).
    seed: of the shuffle and of the rows held out.

  Returns:
    "top1": test accuracy with the chosen learning rate, "learning_rate": that one,
    "held_out_top1": its twin's accuracy on the rows held out, and "top1_0.1" and so on:
    test accuracy with every rate of the grid.

  Raises:
    ValueError: shapes that do not fit, or no labelled rows.
  """
  check_rows("train", train_features, train_labels)
  check_rows("test", test_features, test_labels)
  check_widths(train_features, test_features)
  if not 0 < held_out < 1 or epochs < 1 or not learning_rates:
    raise UserError(
      f"held_out={held_out}, epochs={epochs}, learning_rates={learning_rates}: "
      "a share in (0, 1), at least one epoch, at least one rate"
    )
  mesh = context_mesh()
  count = len(train_features)
  rng = np.random.default_rng(seed)
  order = rng.permutation(count)
  batch_size = -(-min(batch_size, count) // mesh.size) * mesh.size
  found = jax.device_get(
    _run(
      shard_rows(train_features, mesh),
      shard_rows(train_labels, mesh, fill=-1),
      shard_rows(test_features, mesh),
      shard_rows(test_labels, mesh, fill=-1),
      _batches(order, batch_size),
      _batches(rng.permutation(count) < math.ceil(held_out * count), batch_size),
      _batches(np.arange(len(test_features)), batch_size),
      np.asarray(learning_rates, np.float32),
      mesh=mesh,
      num_classes=int(num_classes),
      epochs=int(epochs),
    )
  )
  return _values(found, learning_rates)


def _values(found: dict, learning_rates) -> dict[str, float]:
  for name in ("train", "held_out", "test"):
    if not found[f"{name}_rows"]:
      raise UserError(f"no labelled row among the {name} features")
  held_out_top1 = found["held_out"] / found["held_out_rows"]
  top1 = found["test"] / found["test_rows"]
  best = int(np.argmax(held_out_top1))
  return {
    "top1": float(top1[best]),
    "learning_rate": float(learning_rates[best]),
    "held_out_top1": float(held_out_top1[best]),
    **{f"top1_{rate:g}": float(top1[i]) for i, rate in enumerate(learning_rates)},
  }


def _batches(rows: np.ndarray, batch_size: int) -> np.ndarray:
  """`[steps, batch_size]`; the last is filled up with a row number beyond all rows."""
  pad = -len(rows) % batch_size
  return np.pad(rows, (0, pad), constant_values=BEYOND).reshape(-1, batch_size)


@functools.partial(jax.jit, static_argnames=("mesh", "num_classes", "epochs"))
@jax.default_matmul_precision("highest")
def _run(
  features,
  labels,
  test_features,
  test_labels,
  train_rows,
  is_held_out,
  test_rows,
  learning_rates,
  *,
  mesh: Mesh,
  num_classes: int,
  epochs: int,
):
  """Trains all classifiers `[d, 2, rates, classes]` at once; counts right answers."""

  def predict(params, x):
    kernel, bias = params
    return jnp.einsum("bd,dtgc->btgc", x, kernel) + bias[None]

  def loss(params, x, y, held_out):
    log_p = jax.nn.log_softmax(predict(params, x))
    target = jax.nn.one_hot(y, num_classes)  # Zeros for label -1.
    twins = jnp.stack([jnp.where(held_out[:, None], 0.0, target), target], axis=1)
    count = jnp.maximum(jnp.sum(twins, axis=(0, 2)), 1.0)
    return -jnp.sum(jnp.sum(twins[:, :, None] * log_p, axis=(0, 2, 3)) / count)

  def right(x, y):
    """`[B, 2, rates]`."""
    best = jnp.argmax(predict(params, x), axis=-1)
    return (best == y[:, None, None]) & (y >= 0)[:, None, None]

  x, y = _split(features, labels, train_rows, mesh)
  weight = (y >= 0)[..., None].astype(jnp.float32)
  count = jnp.maximum(jnp.sum(weight), 1.0)
  mean = jnp.sum(x * weight, axis=(0, 1)) / count
  variance = jnp.sum(jnp.square(x - mean[None, None]) * weight, axis=(0, 1)) / count
  # Features that hardly vary stay small rather than become noise of variance 1.
  scale = jax.lax.rsqrt(variance + 1e-6 * jnp.mean(variance) + 1e-30)

  def standardize(x):
    return (x - mean[None, None]) * scale[None, None]

  x = standardize(x)
  steps = epochs * len(x)

  def step(i, carry):
    params, velocity = carry
    b = i % len(x)
    grads = jax.grad(loss)(params, x[b], y[b], is_held_out[b])
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
    rates = 0.5 * (1 + jnp.cos(jnp.pi * i / steps)) * learning_rates

    def move(p, v, g):
      return p - rates.reshape((1,) * (p.ndim - 2) + (-1, 1)) * (0.9 * v + g)

    return jax.tree.map(move, params, velocity, grads), velocity

  shape = (2, len(learning_rates), num_classes)
  zeros = jnp.zeros((x.shape[-1], *shape)), jnp.zeros(shape)
  params, _ = jax.lax.fori_loop(0, steps, step, (zeros, zeros))

  def count_held_out(batch):
    x, y, held_out = batch
    return jnp.sum(right(x, y)[:, 0] & held_out[:, None], axis=0)

  def count_test(batch):
    return jnp.sum(right(*batch)[:, 1], axis=0)

  test_x, test_y = _split(test_features, test_labels, test_rows, mesh)
  return {
    "train_rows": jnp.sum(y >= 0),
    "held_out": jnp.sum(jax.lax.map(count_held_out, (x, y, is_held_out)), axis=0),
    "held_out_rows": jnp.sum((y >= 0) & is_held_out),
    "test": jnp.sum(jax.lax.map(count_test, (standardize(test_x), test_y)), axis=0),
    "test_rows": jnp.sum(test_y >= 0),
  }


def _split(features, labels, rows, mesh: Mesh):
  """Batches `[steps, B, d]` and `[steps, B]`, split over the devices along B."""
  spec = PartitionSpec(None, mesh.axis_names)
  sharding = jax.sharding.NamedSharding(mesh, spec)
  # A column at a time: no device ever holds all features of all devices.
  columns = jax.lax.map(
    lambda column: column.at[rows].get(mode="fill", fill_value=0),
    features.astype(jnp.float32).T,
  )
  x = jax.lax.with_sharding_constraint(jnp.moveaxis(columns, 0, -1), sharding)
  y = labels.at[rows].get(mode="fill", fill_value=-1)
  return x, jax.lax.with_sharding_constraint(y, sharding)


def run(
  embedder,
  /,
  *,
  layer: str = "features",
  learning_rates: tuple[float, ...] = GRID,
  epochs: int = 30,
  batch_size: int = 512,
  held_out: float = 0.1,
  seed: int = 0,
) -> dict[str, float]:
  """The evaluation "linear_probe"; layer: the output that is classified."""
  train, test = (embedder.rows(split, (layer,)) for split in ("train", "test"))
  return linear_probe(
    train[layer],
    train["label"],
    test[layer],
    test["label"],
    num_classes=class_count(embedder, train["label"], test["label"]),
    learning_rates=tuple(learning_rates),
    epochs=epochs,
    batch_size=batch_size,
    held_out=held_out,
    seed=seed,
  )
