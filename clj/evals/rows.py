"""Rows of features over the devices of the mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clj.cli import UserError


def context_mesh() -> Mesh:
  """The mesh of the context (`jax.set_mesh`), or one of a single device."""
  mesh = jax.sharding.get_mesh()
  if not mesh.empty:
    return mesh
  axis_types = (AxisType.Auto, AxisType.Auto)
  return jax.make_mesh((1, 1), ("data", "fsdp"), axis_types, devices=jax.devices()[:1])


def shard_rows(x, mesh: Mesh, multiple: int = 1, fill: int = 0) -> jax.Array:
  """Splits the rows of `x` over all devices, filled up to `multiple` rows on each.

  A NumPy array has all rows, the same on every process. JAX arrays stay on the devices.
  """
  sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  if isinstance(x, jax.Array):
    return jax.device_put(_pad(x, -len(x) % (mesh.size * multiple), fill), sharding)
  x = np.asarray(x)
  pad = [(0, -len(x) % (mesh.size * multiple))] + [(0, 0)] * (x.ndim - 1)
  x = np.pad(x, pad, constant_values=fill)
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _pad(x, rows, fill):
  return jnp.pad(x, [(0, rows)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)


def fetch(x: jax.Array) -> np.ndarray:
  """All rows of an array that is split over the mesh of the context, on every host."""
  if x.is_fully_addressable:
    return np.asarray(x)
  everywhere = NamedSharding(context_mesh(), PartitionSpec())
  return np.asarray(jax.jit(lambda x: x, out_shardings=everywhere)(x))


def check_rows(name: str, features, labels):
  """Refuses features and labels that do not belong together."""
  if features.ndim != 2 or labels.shape != features.shape[:1]:
    raise UserError(
      f"{name} features {features.shape} and labels {labels.shape}: give [N, d] and [N]"
    )


def check_widths(train_features, test_features):
  """Refuses features of training and test rows that cannot be compared."""
  if train_features.shape[1:] != test_features.shape[1:]:
    raise UserError(
      f"features of shape {train_features.shape} and {test_features.shape}: "
      "train and test must have one width"
    )


def normalize(x: jax.Array) -> jax.Array:
  """Rows of length 1, in float32; rows of zeros stay."""
  x = x.astype(jnp.float32)
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def class_count(embedder, *labels) -> int:
  """How many classes there are: as many as have names, or as the labels say."""
  if names := embedder.source("test").classes.get("label"):
    return len(names)
  return max(int(fetch(jnp.max(x))) for x in labels) + 1


def chance(embedder, /, **options) -> float:
  """Accuracy of a guess: 1 / C. The options of an evaluation change nothing."""
  del options
  labels = () if embedder.source("test").classes.get("label") else _labels(embedder)
  return 1 / class_count(embedder, *labels)


def most_frequent(embedder, /, **options) -> float:
  """Accuracy of the class that most of the test rows are of, for all of them."""
  del options
  labels = _labels(embedder)[0]
  counts = np.bincount(labels[labels >= 0])
  return float(counts.max() / counts.sum())


def is_picture(column) -> bool:
  """Whether a column gives pictures, uint8 `[views, H, W, 3]` a row."""
  row, *others = column.test_spec.values()
  picture = len(row.shape) == 4 and row.shape[-1] == 3
  return picture and not others and np.dtype(row.dtype) == np.uint8


def picture_column(embedder, output: str) -> str | None:
  """The column of pictures that an output is made of; None where it is another."""
  (name, column), *others = embedder.columns(output).items()
  return name if is_picture(column) and not others else None


def _labels(embedder):
  return [fetch(embedder.rows("test", ())["label"])]
