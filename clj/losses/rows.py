"""The rows of a batch, whole or one device's shard: what the dense losses share.

A loss is written once, on rows `z_bd` and with sums and gathers over `axis_name`. With
`axis_name=None` the rows are the whole batch and both are the identity.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from clj.losses import softmax


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


def total(x: jax.Array, axis_name) -> jax.Array:
  """The sum of `x` over the axis, whose gradient is that of the sum over the axis.

  Transposed, the cast back to varying is itself a sum: with it the gradients are the
  same under `pmap` and under `shard_map` with and without `check_vma`.
  """
  return x if axis_name is None else softmax.vary(lax.psum(x, axis_name), axis_name)


def gather(x: jax.Array, axis_name) -> jax.Array:
  """The rows of all shards, in order."""
  return x if axis_name is None else softmax.gather(x, axis_name)


def each(fn, *arrays: jax.Array, axis_name) -> jax.Array:
  """Runs `fn(*shards, axis_name)`, whose result has one entry a row, on every shard.

  In the global view (`axis_name=None`) the shards are those of the mesh in context:
  what `fn` builds for each row, such as distances to all others, is then split over
  the devices too.
  """
  axes, axis_name = softmax.placement(axis_name)
  if not axes or len(arrays[0]) % softmax.devices(axes):
    return fn(*arrays, axis_name)
  return jax.shard_map(
    lambda *shards: fn(*shards, axes),
    in_specs=PartitionSpec(axes),
    out_specs=PartitionSpec(axes),
    axis_names=set(axes),
  )(*arrays)


@jax.custom_vjp
def squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
  """|x_i - y_j|^2, `[b, B]` of `[b, d]` and `[B, d]`, from differences.

  Every entry is added up in the same order: equal rows are at equal distances to the
  last bit, wherever they lie and on however many devices, so that ties stay ties.
  """
  return _add_in_order(lambda x, y: jnp.square(x[:, None] - y[None]), x, y)


def _squared_distances_forward(x, y):
  return squared_distances(x, y), (x, y)


def _squared_distances_backward(residuals, g):
  # Differences again: a product with the weights would lose what is small beside x.
  x, y = residuals

  def pull(x, y, g):
    one_row = lambda row: dot(2 * row[1], row[0][None] - y)
    return lax.map(one_row, (x, g), batch_size=16)

  return pull(x, y, g), pull(y, x, g.T)


squared_distances.defvjp(_squared_distances_forward, _squared_distances_backward)


def squared_norms(x: jax.Array) -> jax.Array:
  """|x_i|^2, `[b, 1]`, equal to the last bit for equal rows."""
  return _add_in_order(jnp.square, x)[:, None]


def _add_in_order(term, *arrays, block=16):
  """The sum over columns k of `term` of the k-th columns, one after the other."""

  def columns(x):
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)))
    return padded.T.reshape(-1, block, len(x))

  def add(total, blocks):
    for k in range(block):
      total = total + term(*(x[k] for x in blocks))
    return total, None

  blocks = [columns(x) for x in arrays]
  start = jnp.zeros_like(term(*(x[0, 0] for x in blocks)))
  total, _ = add(start, [x[0] for x in blocks])
  total, _ = lax.scan(add, total, [x[1:] for x in blocks])
  return total


def reduce(
  values: jax.Array, reduction: str, weights: jax.Array | None = None, axis_name=None
) -> jax.Array:
  """The mean, the sum or all of the rows' `values` `[B]`.

  With `weights` `[B]` the mean is their weighted sum by the sum of the weights.
  """
  if weights is not None:
    values = values * weights
  if reduction == "none":
    return values
  if reduction == "sum":
    return values.sum() * devices(axis_name)
  if reduction == "mean":
    if weights is None:
      return values.mean()
    return values.sum() * devices(axis_name) / total(weights.sum(), axis_name)
  raise ValueError(f'reduction is "mean", "sum" or "none", not {reduction!r}')
