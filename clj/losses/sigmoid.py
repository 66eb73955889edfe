"""Tiled pairwise sigmoid loss: the sigmoid's counterpart of `clj/losses/softmax.py`.

With l_ij = scale <x_i, y_j> + bias the loss of row i is
softplus(-l_ii) + sum_{j != i} softplus(l_ij). Memory, placement and dtypes are those of
the softmax primitive; the columns need no statistics, so that one scalar a row, its
cotangent, is all that is gathered beside the embeddings.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from clj.losses import softmax


def log_sigmoid_sum(x, y, scale, bias, *, ids=None, axis_name=None, ring=False):
  """`[n]` float32: the sum over j of -log sigmoid(+-l_ij), plus for the pair j = i.

  x, y: `[n, d]`, pairs; scale, bias: scalars; ids: int `[n]`, other pairs of equal id
  are left out. axis_name: local shards inside the caller's `shard_map` or `pmap`.
  Differentiable in x, y, scale and bias.
  """
  if x.ndim != 2 or x.shape != y.shape:
    raise ValueError(f"pairs differ in shape: {x.shape} and {y.shape}")
  axes, axis_name = softmax.placement(axis_name)
  plan = _Plan(axes, axis_name, ring)
  scale, bias = jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)
  if axes:
    softmax.check_divides(x.shape[0], softmax.devices(axes), axes)
  if ids is None:
    ids = softmax.positions(x.shape[0], axis_name)
  dtype = jnp.result_type(x, y)
  arrays = _Arrays(x.astype(dtype), y.astype(dtype), scale, bias, ids)
  return _primitive(plan, softmax.vary_alike(arrays, axis_name))


class _Plan(NamedTuple):
  mesh_axes: tuple[str, ...]
  axis_name: Any
  ring: bool


class _Arrays(NamedTuple):
  x: Any
  y: Any
  scale: Any
  bias: Any
  ids: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _primitive(plan, arrays):
  return _primitive_fwd(plan, arrays)[0]


def _primitive_fwd(plan, arrays):
  if not plan.mesh_axes:
    out, gathered = _local_forward(plan.ring, plan.axis_name, arrays)
  else:
    rows = PartitionSpec(plan.mesh_axes)
    out, gathered = jax.shard_map(
      functools.partial(_local_forward, plan.ring, plan.mesh_axes),
      in_specs=(_specs(rows),),
      out_specs=(rows, PartitionSpec()),
      axis_names=set(plan.mesh_axes),
      check_vma=False,
    )(arrays)
  return out, (arrays, gathered)


def _primitive_bwd(plan, residuals, g):
  arrays, gathered = residuals
  if not plan.mesh_axes:
    return (_local_backward(plan.ring, plan.axis_name, arrays, gathered, g),)
  rows = PartitionSpec(plan.mesh_axes)

  def backward(*args):
    grads = _local_backward(plan.ring, plan.mesh_axes, *args)
    scalars = jax.lax.psum((grads.scale, grads.bias), plan.mesh_axes)
    return grads._replace(scale=scalars[0], bias=scalars[1])

  grads = jax.shard_map(
    backward,
    in_specs=(_specs(rows), PartitionSpec(), rows),
    out_specs=_specs(rows)._replace(ids=None),
    axis_names=set(plan.mesh_axes),
    check_vma=False,
  )(arrays, gathered, g)
  return (grads,)


_primitive.defvjp(_primitive_fwd, _primitive_bwd)


def _specs(rows):
  return _Arrays(rows, rows, PartitionSpec(), PartitionSpec(), rows)


class _Side(NamedTuple):
  z: Any
  ids: Any
  g: Any = None


def _local_forward(ring, axes, arrays):
  x, y = _Side(arrays.x, arrays.ids), _Side(arrays.y, arrays.ids)
  positive = arrays.scale * _similarity(arrays) + arrays.bias
  rows = jax.nn.softplus(-positive)
  if axes is None:
    return _forward(x, y, arrays, rows), None
  if ring:
    body = lambda rows, y, _: (_forward(x, y, arrays, rows), None)
    return softmax.ring_loop(axes, body, rows, y, None)[0], None
  gathered = softmax.gather(y, axes)
  return _forward(x, gathered, arrays, rows), gathered


def _local_backward(ring, axes, arrays, gathered, g):
  x, y = _Side(arrays.x, arrays.ids, g), _Side(arrays.y, arrays.ids)
  c = _similarity(arrays)
  own = g * jax.nn.sigmoid(-(arrays.scale * c + arrays.bias))

  def loop(rows, columns, both=False):
    carry = (
      softmax.zeros(rows.z.shape, rows.z),
      softmax.zeros(columns.z.shape, rows.z) if both else None,
      softmax.zeros((), rows.z),
      softmax.zeros((), rows.z),
    )
    if not ring or axes is None:
      return _backward(rows, columns, arrays, carry)
    body = lambda carry, columns, _: (_backward(rows, columns, arrays, carry), None)
    return softmax.ring_loop(axes, body, carry, columns, None)[0]

  if axes is None:
    dx, dy, dscale, dbias = loop(x, y, both=True)
  else:
    dx, _, dscale, dbias = loop(x, y if ring else gathered)
    dy, _, _, _ = loop(y, x if ring else softmax.gather(x, axes))
  dx -= own[:, None] * arrays.y.astype(jnp.float32)
  dy -= own[:, None] * arrays.x.astype(jnp.float32)
  return _Arrays(
    x=(arrays.scale * dx).astype(arrays.x.dtype),
    y=(arrays.scale * dy).astype(arrays.y.dtype),
    scale=dscale - jnp.sum(own * c),
    bias=dbias - jnp.sum(own),
    ids=None,
  )


def _similarity(arrays):
  return jnp.sum(arrays.x.astype(jnp.float32) * arrays.y.astype(jnp.float32), axis=1)


def _tile(x, y, ij, tile_n, tile_m):
  tile_x, fresh_x = softmax.take(x, ij[0], tile_n)
  tile_y, fresh_y = softmax.take(y, ij[1], tile_m)
  c = softmax.product(tile_x.z, tile_y.z, ((1,), (1,)))
  keep = tile_x.ids[:, None] != tile_y.ids[None, :]
  if fresh_x is not None:
    keep &= fresh_x[:, None]
  if fresh_y is not None:
    keep &= fresh_y[None, :]
  return c, keep, tile_x, tile_y


def _forward(x, y, arrays, rows):
  """Adds the softplus of all tiles to the rows."""
  n, m = x.z.shape[0], y.z.shape[0]
  tile_n, tile_m = softmax.tile_sizes(n, m)

  def step(rows, ij):
    c, keep, _, _ = _tile(x, y, ij, tile_n, tile_m)
    e = jnp.where(keep, jax.nn.softplus(arrays.scale * c + arrays.bias), 0.0)
    return softmax.add(rows, ij[0], tile_n, jnp.sum(e, axis=1)), None

  table = softmax.tile_table(n, m, tile_n, tile_m)
  return jax.lax.scan(step, rows, (table[:, 0], table[:, 1]))[0]


def _backward(x, y, arrays, carry):
  """Adds sums over j of w_ij y_j, over i of w_ij x_i, of w_ij c_ij and of w_ij.

  w_ij is the derivative of the loss in l_ij, the pair itself left out; its cotangent
  belongs to the side that has one. The sums over i are left out where the carry has no
  place for them.
  """
  n, m, both = x.z.shape[0], y.z.shape[0], carry[1] is not None
  tile_n, tile_m = softmax.tile_sizes(n, m, both)

  def step(carry, ij):
    dx, dy, dscale, dbias = carry
    c, keep, tile_x, tile_y = _tile(x, y, ij, tile_n, tile_m)
    w = jnp.where(keep, jax.nn.sigmoid(arrays.scale * c + arrays.bias), 0.0)
    w *= tile_y.g[None, :] if x.g is None else tile_x.g[:, None]
    dscale += jnp.sum(w * c)
    dbias += jnp.sum(w)
    w = w.astype(x.z.dtype)
    dx = softmax.add(dx, ij[0], tile_n, softmax.product(w, tile_y.z, ((1,), (0,))))
    if dy is not None:
      dy = softmax.add(dy, ij[1], tile_m, softmax.product(w, tile_x.z, ((0,), (0,))))
    return (dx, dy, dscale, dbias), None

  table = softmax.tile_table(n, m, tile_n, tile_m)
  return jax.lax.scan(step, carry, (table[:, 0], table[:, 1]))[0]
