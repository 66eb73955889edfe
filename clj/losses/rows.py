"""The rows of a batch, whole or one device's shard: what the dense losses share.

A loss is written once, on rows `z_bd` and with sums and gathers over `axis_name`. With
`axis_name=None` the rows are the whole batch and both are the identity.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec


def accurate(x: jax.Array) -> jax.Array:
  """`x` in float32, or float64 where it is: the precision of statistics."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """`a @ b` with at least float32 accumulation and result.

  The default precision of float32 operands is bfloat16 passes on a TPU.
  """
  return jnp.matmul(
    a,
    b,
    precision=lax.Precision.HIGHEST,
    preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
  )


def devices(axis_name) -> int:
  return 1 if axis_name is None else lax.axis_size(axis_name)


def count(z: jax.Array, axis_name) -> int:
  """Rows of the whole batch."""
  return len(z) * devices(axis_name)


def first(z: jax.Array, axis_name):
  """The number, in the whole batch, of the first row of this shard."""
  return 0 if axis_name is None else lax.axis_index(axis_name) * len(z)


def varying(x: jax.Array, axis_name) -> jax.Array:
  return x if axis_name is None else lax.pcast(x, axis_name, to="varying")


def total(x: jax.Array, axis_name) -> jax.Array:
  """The sum of `x` over the axis, whose gradient is that of the sum over the axis.

  Transposed, the cast back to varying is itself a sum: with it the gradients are the
  same under `pmap` and under `shard_map` with and without `check_vma`.
  """
  return x if axis_name is None else varying(lax.psum(x, axis_name), axis_name)


def gather(x: jax.Array, axis_name) -> jax.Array:
  """The rows of all shards, in order."""
  return x if axis_name is None else lax.all_gather(x, axis_name, tiled=True)


def batch_axes(size: int):
  """The axes of the mesh in context that a batch of `size` rows is split over."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types)
    if name in ("data", "fsdp") and kind != AxisType.Manual
  )
  split = 1
  for name in axes:
    split *= mesh.shape[name]
  return axes if split > 1 and size % split == 0 else None


def each(fn, *arrays: jax.Array, axis_name) -> jax.Array:
  """Runs `fn(*shards, axis_name)`, whose result has one entry a row, on every shard.

  In the global view (`axis_name=None`) the shards are those of the mesh in context:
  what `fn` builds for each row, such as distances to all others, is then split over
  the devices too.
  """
  axes = batch_axes(len(arrays[0])) if axis_name is None else None
  if axes is None:
    return fn(*arrays, axis_name)
  return jax.shard_map(
    lambda *shards: fn(*shards, axes),
    in_specs=PartitionSpec(axes),
    out_specs=PartitionSpec(axes),
  )(*arrays)


def reduce(values: jax.Array, reduction: str, weights: jax.Array | None = None):
  """The mean, the sum or all of the rows' `values` `[B]`.

  With `weights` `[B]` the mean is their weighted sum by the sum of the weights.
  """
  if weights is not None:
    values = values * weights
  if reduction == "none":
    return values
  if reduction == "sum":
    return values.sum()
  if reduction == "mean":
    return values.mean() if weights is None else values.sum() / weights.sum()
  raise ValueError(f'reduction is "mean", "sum" or "none", not {reduction!r}')
