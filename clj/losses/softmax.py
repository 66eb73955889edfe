"""Tiled log-sum-exp: the one primitive behind the softmax losses.

For rows x_i and columns y_j the logits are

    s_ij = scale * (<x_i, y_j> - reference_i) + bias_j

and the primitive returns, for every row, the log-sum-exp of s_ij over the columns that
are not masked. No matrix of logits exists at any time: both passes recompute it tile by
tile, and the backward pass is written out (`custom_vjp`).

The positive is kept apart. With the positive's similarity as the reference, the result
is m_i = logsumexp_{j != pos} s_ij - s_i,pos, the cross entropy of the row is
`softplus(m_i)`, and its derivative `sigmoid(m_i)` is never a difference of nearly equal
numbers, however well the pairs are aligned. The reference is summed exactly: in tight
clusters the gradient of the scale is a small difference of similarities. More columns
(a queue, hard negatives) are `logaddexp` of two results with the same reference.

Where the norms bound the logits (a scale of 60 at most between unit vectors), their
exponentials need no maxima, and one of them serves its row and its column; anything
larger runs with maxima relative to each positive. Both are in the program, and the
batch decides (pairs on several devices and the ring always run with maxima).

Arrays are global. Under `jax.set_mesh` rows are split over the batch axes of the mesh;
each device gathers every side once, and O(B) scalars, and no gradient ever travels but
the sum of the scale's. With `axis_name` the arrays are local shards inside the caller's
own `shard_map` or `pmap`; there the gradient is that of the sum over the axis.

Operands keep their dtype (float32 products have `precision=HIGHEST`), everything else
is float32.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

BATCH_AXES = ("data", "fsdp")  # the mesh axes that split a batch, see clj/sharding.py


def log_sum_exp(
  x,
  y,
  scale,
  *,
  aligned=False,
  reference=None,
  bias=None,
  y_scale=None,
  row_ids=None,
  col_ids=None,
  normalize=False,
  axis_name=None,
  ring=False,
):
  """Log-sum-exp over the columns y of every row x, relative to the positive.

  x: `[n, d]`; y: `[m, d]`, same dtype. scale: scalar, multiplies the similarities.
  aligned: the positive of row i is column i (n = m); it is left out of the sum and its
    similarity is the reference.
  reference: `[n]`, similarity of each row's positive where it is not in `aligned`
    position (differentiable; 0 where not given). In units of <x, y>, before the scale.
  bias: `[m]`, added to the logits of a column, after the scale (logQ correction).
  y_scale: `[m]`, multiplies the similarities of a column.
  row_ids, col_ids: int `[n]`, `[m]`; columns with the id of the row are left out: the
    positive, duplicates, accidental hits. With `aligned`, the default is the position.
  normalize: the rows of x and y are L2-normalised first.
  axis_name: x, y, ... are local shards over this axis of a `shard_map` or `pmap`.
  ring: the columns travel from device to device instead of being gathered: the same
    result in less memory, for batches whose gathered columns do not fit.

  Returns `[n]` float32: m_i = logsumexp_j s_ij - scale * reference_i, -inf where every
  column is masked. Differentiable in x, y, scale, reference, bias and y_scale.
  """
  n, m = x.shape[0], y.shape[0]
  if aligned and n != m:
    raise ValueError(f"aligned rows and columns differ in number: {n} and {m}")
  if (row_ids is None) != (col_ids is None):
    raise ValueError("row_ids and col_ids are given together or not at all")
  plan = _plan("rows", aligned, normalize, axis_name, ring)
  if aligned and row_ids is None:
    row_ids = col_ids = positions(n, plan.axis_name)
  arrays = _Arrays(x, y, scale, reference, bias, y_scale, row_ids, col_ids)
  if plan.mesh_axes and not aligned and m % devices(plan.mesh_axes):
    arrays = _pad_columns(arrays, -m % devices(plan.mesh_axes))
  return _log_sum_exp(plan, arrays)[0]


def log_sum_exp_pair(
  x, y, scale, *, ids=None, normalize=False, axis_name=None, ring=False
):
  """Both directions of `log_sum_exp(aligned=True)` over the same logits.

  x, y: `[n, d]`, pairs; ids: int `[n]`, pairs of equal id are no negatives.
  Returns `[n], [n]`: every x over the y, every y over the x. One device computes each
  logit once a pass.
  """
  plan = _plan("pair", True, normalize, axis_name, ring)
  ids = positions(x.shape[0], plan.axis_name) if ids is None else ids
  return _log_sum_exp(plan, _Arrays(x, y, scale, None, None, None, ids, ids))


def log_sum_exp_self(
  z1, z2, scale, *, ids=None, normalize=False, axis_name=None, ring=False
):
  """Every row of two views over all the rows of both, itself and its partner left out.

  z1, z2: `[n, d]`, partners; ids: int `[n]`, pairs of equal id are no negatives.
  Returns `[n], [n]`, relative to the partner's similarity. One device computes each of
  the symmetric logits once a pass.
  """
  plan = _plan("self", True, normalize, axis_name, ring)
  ids = positions(z1.shape[0], plan.axis_name) if ids is None else ids
  return _log_sum_exp(plan, _Arrays(z1, z2, scale, None, None, None, ids, ids))


def log_sum_exp_labels(z, scale, *, labels, positives, reference, axis_name=None):
  """Every row over all the others, relative to the mean of its positives.

  z: `[n, d]`; labels: int `[n]`: the positives of a row are the other rows of its
  label. positives: `[n]`, their number; reference: `[n]`, their mean similarity, which
  gets no gradient: z gets it.
  Returns `[n]`. One device computes each of the symmetric logits once a pass.

  The positives stay in the sum, so that where a row is nearly done its weights are
  small differences, softmax less target. They are formed for each logit, from
  similarities that are not rounded.
  """
  plan = _plan("self", False, False, axis_name, False)
  ids = positions(z.shape[0], plan.axis_name)
  reference, positives = jax.lax.stop_gradient(reference), _f32(positives)
  arrays = _Arrays(z, None, scale, reference, None, None, ids, None, labels, positives)
  return _log_sum_exp(plan, arrays)[0]


class _Plan(NamedTuple):
  """What is static: the shape of the computation and where its rows are."""

  mode: str  # "rows", "pair" or "self"
  aligned: bool
  normalize: bool
  mesh_axes: tuple[str, ...]  # global arrays, split over these axes of the mesh
  axis_name: Any  # local arrays, split over this axis by the caller
  ring: bool


class _Arrays(NamedTuple):
  x: Any
  y: Any
  scale: Any
  reference: Any
  bias: Any
  y_scale: Any
  row_ids: Any
  col_ids: Any
  labels: Any = None
  positives: Any = None


class _Side(NamedTuple):
  """The rows or the columns of a tile loop, and what belongs to each of them."""

  z: Any
  norm: Any  # factor of the similarities, [n] or None
  bias: Any
  ids: Any
  stats: Any = None  # _Stats of the softmax of each row of this side, or None
  labels: Any = None


class _Stats(NamedTuple):
  """The softmax of a row. Bounded logits are exponentiated without their reference."""

  reference: Any
  low: Any = None  # what rounding took from the reference, where that was computed
  top: Any = None
  weight: Any = None  # cotangent over the sum of exp(s_ij - top_i)


class _Kept(NamedTuple):
  """What the forward pass keeps for the backward pass beside its arguments."""

  bounded: Any  # None where that was not asked
  sums: Any  # (top, total) of the softmaxes
  gathered: Any  # the columns, where devices share them


def _plan(mode, aligned, normalize, axis_name, ring):
  return _Plan(mode, aligned, normalize, *placement(axis_name), ring)


def placement(axis_name):
  """Where the rows of a batch are: `(mesh axes that split it, axis_name)`."""
  if axis_name is not None:
    return (), axis_name
  mesh = jax.sharding.get_abstract_mesh()
  types = dict(zip(mesh.axis_names, mesh.axis_types))
  manual = AxisType.Manual
  axes = tuple(a for a in BATCH_AXES if types.get(a, manual) != manual)
  if devices(axes) == 1:
    axes = ()
  return axes, None


def devices(mesh_axes):
  mesh = jax.sharding.get_abstract_mesh()
  return int(np.prod([mesh.shape[axis] for axis in mesh_axes]))


def positions(n, axis_name):
  start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * n
  return jnp.arange(n, dtype=jnp.int32) + start


def _pad_columns(arrays, extra):
  """Adds columns that no row sees, so that the devices divide their number."""

  def pad(a, value):
    return jnp.pad(a, [(0, extra)] + [(0, 0)] * (a.ndim - 1), constant_values=value)

  m = arrays.y.shape[0]
  bias = jnp.zeros((m,), jnp.float32) if arrays.bias is None else arrays.bias
  return arrays._replace(
    y=pad(arrays.y, 0),
    bias=pad(bias, -jnp.inf),
    y_scale=None if arrays.y_scale is None else pad(arrays.y_scale, 1),
    col_ids=None if arrays.col_ids is None else pad(arrays.col_ids, -1),
  )


# The differentiation rule stands outside shard_map, so that nothing is transposed.


def _log_sum_exp(plan, arrays):
  scale = jnp.asarray(arrays.scale, jnp.float32)
  z = [array for array in (arrays.x, arrays.y) if array is not None]
  for array in z:
    if array.ndim != 2 or array.shape[1] != arrays.x.shape[1]:
      shapes = " and ".join(str(a.shape) for a in z)
      raise ValueError(f"embeddings are [n, d] of one width, got {shapes}")
  if plan.aligned and arrays.x.shape != arrays.y.shape:
    raise ValueError(f"pairs differ in shape: {arrays.x.shape} and {arrays.y.shape}")
  if plan.mesh_axes:
    check_divides(arrays.x.shape[0], devices(plan.mesh_axes), plan.mesh_axes)
  dtype = jnp.result_type(*z)
  x, y = jax.tree.map(lambda a: a.astype(dtype), (arrays.x, arrays.y))
  arrays = arrays._replace(x=x, y=y, scale=scale)
  return _primitive(plan, vary_alike(arrays, plan.axis_name))


def check_divides(rows, devices, axes, what="batch"):
  if rows % devices:
    raise ValueError(
      f"a {what} of {rows} does not divide over the {devices} devices of mesh axes "
      f"{', '.join(axes)}; use a multiple of {devices}"
    )


def vary(a, axis_name):
  """Marks a replicated array as varying over the caller's axis."""
  axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
  axes = tuple(axis for axis in axes if axis not in varying(a))
  return jax.lax.pcast(a, axes, to="varying") if axes else a


def varying(a):
  """The axes of a caller's `shard_map` over which an array is known to vary."""
  return jax.typeof(a).mat.varying


def vary_alike(arrays, axis_name):
  """Marks all arrays as varying over the axes over which any of them does.

  So they do inside a caller's `shard_map`, even where a loss of rows that stand alone
  needs no `axis_name` and gets, say, the same queue on all devices.
  """
  axes = frozenset().union(*(varying(a) for a in jax.tree.leaves(arrays)))
  if axis_name is not None:
    axes |= set(axis_name if isinstance(axis_name, tuple) else (axis_name,))
  return jax.tree.map(lambda a: vary(a, tuple(sorted(axes))), arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _primitive(plan, arrays):
  return _primitive_fwd(plan, arrays)[0]


def _primitive_fwd(plan, arrays):
  if not plan.mesh_axes:
    out, kept = _local_forward(plan, plan.axis_name, arrays)
  else:
    rows = PartitionSpec(plan.mesh_axes)
    out, kept = jax.shard_map(
      functools.partial(_local_forward, plan, plan.mesh_axes),
      in_specs=(_specs(arrays, rows),),
      out_specs=(rows, _kept_specs(rows)),
      axis_names=set(plan.mesh_axes),
      check_vma=False,
    )(arrays)
  return out, (arrays, out, kept)


def _primitive_bwd(plan, residuals, g):
  arrays, out, kept = residuals
  if not plan.mesh_axes:
    grads = _local_backward(plan, plan.axis_name, arrays, kept, g)
  else:
    rows = PartitionSpec(plan.mesh_axes)

    def backward(*args):
      grads = _local_backward(plan, plan.mesh_axes, *args)
      return grads._replace(scale=jax.lax.psum(grads.scale, plan.mesh_axes))

    specs = _specs(arrays, rows)
    grads = jax.shard_map(
      backward,
      in_specs=(specs, _kept_specs(rows), rows),
      out_specs=specs._replace(row_ids=None, col_ids=None, labels=None, positives=None),
      axis_names=set(plan.mesh_axes),
      check_vma=False,
    )(arrays, kept, g)
  return (grads,)


_primitive.defvjp(_primitive_fwd, _primitive_bwd)


def _specs(arrays, rows):
  specs = _Arrays(*[None if a is None else rows for a in arrays])
  return specs._replace(scale=PartitionSpec())


def _kept_specs(rows):
  return _Kept(bounded=PartitionSpec(), sums=rows, gathered=PartitionSpec())


# One device's part. `axes` are the axes over which the rows are split, None on one.


def _local_forward(plan, axes, arrays):
  x, y = _sides(plan, arrays)
  scale, columns, gathered = arrays.scale, y, None
  if axes is not None and not plan.ring:
    columns = gather(y, axes)
    gathered = columns._replace(stats=None)

  def sums(bounded):
    rows = _no_logits(x, bounded)
    cols = _no_logits(columns, bounded) if plan.mode == "pair" else None
    if plan.ring and axes is not None:
      return _ring_forward(plan, axes, arrays, x, y, bounded, rows, cols)
    triangle = plan.mode == "self" and axes is None
    return _forward(x, columns, scale, bounded, rows, cols, triangle)

  # A choice of two loops keeps what they carry in a TPU's HBM. On more than one device
  # only the form that carries one side's gradient, and is not there for its memory, has
  # it. Relative to its positives' mean a row's small weights are more accurate.
  choice = axes is None or not (plan.ring or plan.mode == "pair")
  choice &= arrays.labels is None
  bounded = _bounded(x, y, scale, axes) if choice else None
  rows, cols = _either(bounded, sums)
  if plan.mode == "pair" and gathered is not None:
    # Each device has seen its own rows: the columns' sums go where the columns are.
    top = jax.lax.pmax(cols[0], axes)
    total = cols[1] * jnp.exp(cols[0] - _finite(top))
    total = jax.lax.psum_scatter(total, axes, tiled=True)
    n = y.z.shape[0]
    start = jax.lax.axis_index(axes) * n
    cols = jax.lax.dynamic_slice_in_dim(top, start, n), total
  stats = x.stats
  out = (_relative(rows, stats, scale, bounded),)
  if plan.mode == "pair":
    out += (_relative(cols, stats, scale, bounded),)
  if plan.mode == "self" and plan.aligned:
    out = tuple(jnp.split(out[0], 2))
  return out, _Kept(bounded, (rows, cols), gathered)


BOUND = 60.0  # of the magnitude of logits that are exponentiated as they are


def _bounded(x, y, scale, axes):
  """Whether no logit of any device can be larger than BOUND, by the norms.

  Then no sum of exponentials overflows (exp(88) is the end of float32) or vanishes, and
  a logit's rounding is no more than what its similarity's becomes times the scale.
  """

  def longest(side):
    norms = jnp.sqrt(jnp.sum(jnp.square(_f32(side.z)), axis=1))
    return jnp.max(norms if side.norm is None else norms * jnp.abs(side.norm))

  bound = jnp.abs(scale) * longest(x) * longest(y)
  if y.bias is not None:
    bound += jnp.max(jnp.where(jnp.isfinite(y.bias), jnp.abs(y.bias), 0.0))
  return (bound if axes is None else jax.lax.pmax(bound, axes)) <= BOUND


def _either(bounded, loop):
  """`loop(True)` where the logits are bounded, else `loop(False)`."""
  if bounded is None:
    return loop(False)
  return jax.lax.cond(bounded, lambda: loop(True), lambda: loop(False))


def _relative(sums, stats, scale, bounded):
  """The log-sum-exp relative to the positive's logit."""
  top, total = sums
  lse = _finite(top) + jnp.log(total)
  if bounded is not None:
    lse -= jnp.where(bounded, scale * stats.reference, 0.0)
  return lse if stats.low is None else lse - scale * stats.low


def _weighted(arrays, stats, sums, g):
  """The statistics that the backward pass takes: of each row its sums and cotangent."""
  top, total = sums
  if arrays.labels is not None:  # so that the weight is that of a target too
    count = jnp.maximum(arrays.positives, 1)
    top, total = top + jnp.log(total / count), count
  weight = jnp.where(total > 0, g / total, 0.0)
  return _Stats(stats.reference, top=_finite(top), weight=weight)


def _local_backward(plan, axes, arrays, kept, g):
  x, y = _sides(plan, arrays)
  scale, gathered, (rows, cols) = arrays.scale, kept.gathered, kept.sums
  g = (jnp.concatenate(g),) if plan.mode == "self" else g

  # The scale's gradient is summed around the mean reference, against cancellation.
  reference, low = x.stats.reference, x.stats.low
  center = jnp.mean(reference)
  if axes is not None:
    center = vary(jax.lax.pmean(center, axes), tuple(sorted(varying(reference))))
  x = x._replace(stats=_weighted(arrays, x.stats, rows, g[0]))
  if plan.mode == "self":
    y = x
  if plan.mode == "pair":
    y = y._replace(stats=_weighted(arrays, y.stats, cols, g[1]))
  weights = sum(g)
  distance = reference - center
  dscale = -jnp.sum(weights * (distance if low is None else distance + low))
  if arrays.labels is not None:  # the tiles have the positives
    dscale = jnp.zeros_like(dscale)
  elif plan.mode == "self":  # from here on what belongs to a pair
    weights = sum(jnp.split(weights, 2))
  if gathered is not None:
    all_y = gathered._replace(stats=gather(y.stats, axes))
    all_x = None if plan.mode == "self" else gather(x, axes)

  def sums(bounded):
    loop = functools.partial(_backward, scale=scale, bounded=bounded, center=center)
    if axes is None:
      triangle = plan.mode == "self"
      start = _no_gradients(x, y, both=not triangle)
      return loop(x, y, start, triangle=triangle)
    if plan.ring:
      return _ring_backward(plan, axes, arrays, x, y, loop)
    dx, _, total, dbias = loop(x, all_y, _no_gradients(x, all_y))
    if plan.mode == "self":
      return dx, None, total, None
    dy, _, _, dbias = loop(y, all_x, _no_gradients(y, all_x))
    return dx, dy, total, dbias

  def gradients(bounded):
    dx, dy, total, dbias = sums(bounded)
    # Where no triangle halves them, the rows of "self" have met each logit twice.
    twice = plan.mode == "self" and axes is not None
    if plan.mode == "self" and plan.aligned and not (plan.ring and axes is not None):
      dx, dy = jnp.split(dx, 2)
    if plan.aligned:
      dx -= weights[:, None] * _unit(plan, arrays.y, arrays.y_scale)
      dy -= weights[:, None] * _unit(plan, arrays.x)
    dx, dy = jax.tree.map(lambda d: scale * d, (dx, dy))

    dy_scale = None
    if arrays.y_scale is not None:
      dy_scale = jnp.sum(_unit(plan, arrays.y) * dy, axis=1)
      dy_scale = dy_scale.astype(arrays.y_scale.dtype)
      dy *= _f32(arrays.y_scale)[:, None]
    if plan.normalize:
      dx, dy = normalize_vjp(arrays.x, dx), normalize_vjp(arrays.y, dy)
    dreference = None
    if arrays.reference is not None:
      dreference = (-scale * g[0]).astype(arrays.reference.dtype)
    return _Arrays(
      x=dx.astype(arrays.x.dtype),
      y=None if dy is None else dy.astype(arrays.y.dtype),
      scale=dscale + (total / 2 if twice else total),
      reference=dreference,
      bias=None if arrays.bias is None else dbias.astype(arrays.bias.dtype),
      y_scale=dy_scale,
      row_ids=None,
      col_ids=None,
      labels=None,
      positives=None,
    )

  return _either(kept.bounded, gradients)


# The ring: one side stays, the other travels, and comes home after as many hops as
# there are devices. Nothing is gathered; both passes compute the tiles as they come.


def ring_loop(axes, body, carry, traveller, luggage):
  """`carry, luggage = body(carry, traveller, luggage)` on every shard of the traveller.

  The luggage is what the traveller collects on its way home.
  """
  size = jax.lax.axis_size(axes)
  order = [(i, (i + 1) % size) for i in range(size)]

  def hop(state, _):
    carry, traveller, luggage = state
    carry, luggage = body(carry, traveller, luggage)
    send = lambda a: jax.lax.ppermute(a, axes, order)
    return (carry, *jax.tree.map(send, (traveller, luggage))), None

  carry, _, luggage = jax.lax.scan(hop, (carry, traveller, luggage), None, size)[0]
  return carry, luggage


def _ring_forward(plan, axes, arrays, x, y, bounded, rows, cols):
  def body(rows, y, cols):
    return _forward(x, y, arrays.scale, bounded, rows, cols)

  for columns in _views(x) if plan.mode == "self" else [y]:
    rows, cols = ring_loop(axes, body, rows, columns, cols)
  return rows, cols


def _ring_backward(plan, axes, arrays, x, y, loop):
  def around(rows, columns, carry):
    body = lambda carry, columns, _: (loop(rows, columns, carry), None)
    return ring_loop(axes, body, carry, columns, None)[0]

  if plan.mode != "self":
    dx, _, total, _ = around(x, y, _no_gradients(x, y))
    dy, _, _, dbias = around(y, x, _no_gradients(y, x))
    return dx, dy, total, dbias
  grads, total = [], 0.0
  for rows in _views(x):  # one view's gradient at a time, for the memory's sake
    carry = _no_gradients(rows, rows)
    for columns in _views(x):
      carry = around(rows, columns, carry)
    grads.append(carry[0])
    total += carry[2]
  return *grads, total, None


def _views(side):
  """The two halves of the rows of "self"."""
  b = side.z.shape[0] // 2
  first, second = (lambda a: a[:b]), (lambda a: a[b:])
  return [jax.tree.map(first, side), jax.tree.map(second, side)]


def _sides(plan, arrays):
  """The rows and columns on this device, with the references of their softmaxes."""
  norm_x = norm_y = stats_y = None
  if plan.normalize:
    norm_x, norm_y = inverse_norm(arrays.x), inverse_norm(arrays.y)
  if plan.aligned:
    products = _unit(plan, arrays.x) * _unit(plan, arrays.y, arrays.y_scale)
    stats = _Stats(*_exact_sum(products))
  elif arrays.reference is not None:
    stats = _Stats(_f32(arrays.reference))
  else:
    stats = _Stats(jnp.zeros_like(arrays.x[:, 0], jnp.float32))
  if arrays.labels is not None:
    side = _Side(arrays.x, None, None, arrays.row_ids, stats, arrays.labels)
    return side, side
  if plan.mode == "self":
    join = lambda a, b: jnp.concatenate([a, b])
    norm = None if norm_x is None else join(norm_x, norm_y)
    ids, stats = join(arrays.row_ids, arrays.col_ids), jax.tree.map(join, stats, stats)
    side = _Side(join(arrays.x, arrays.y), norm, None, ids, stats)
    return side, side
  if arrays.y_scale is not None:
    y_scale = _f32(arrays.y_scale)
    norm_y = y_scale if norm_y is None else norm_y * y_scale
  if plan.mode == "pair":
    stats_y = _Stats(stats.reference)
  bias = None if arrays.bias is None else _f32(arrays.bias)
  return (
    _Side(arrays.x, norm_x, None, arrays.row_ids, stats),
    _Side(arrays.y, norm_y, bias, arrays.col_ids, stats_y),
  )


def _exact_sum(terms):
  """The sums over axis 1 as float32 and what that rounds away.

  Rounded to a grid so coarse that their sum is exact, the terms leave remainders so
  small that the rounding of their sum does not count.
  """
  far = 2 * jnp.sum(jnp.abs(terms), axis=1, keepdims=True)
  coarse = (terms + far) - far
  large, small = jnp.sum(coarse, axis=1), jnp.sum(terms - coarse, axis=1)
  total = large + small
  return total, small - (total - large)


def _f32(a):
  return a.astype(jnp.float32)


def _unit(plan, z, factor=None):
  """What stands for z in the similarities, float32."""
  unit = _f32(z)
  if plan.normalize:
    unit *= inverse_norm(z)[:, None]
  return unit if factor is None else unit * _f32(factor)[:, None]


def gather(tree, axes):
  """Every device's shard, in the order of the rows."""
  return jax.tree.map(lambda a: jax.lax.all_gather(a, axes, tiled=True), tree)


EPSILON = 1e-12  # of the squared norm, as in TensorFlow's l2_normalize


def inverse_norm(z):
  """`[n]` float32: 1 / |z_i|, bounded by 1e6."""
  return jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(_f32(z)), axis=1), EPSILON))


def normalize_vjp(z, d):
  """The gradient of z from that of z / |z|; 0 for rows of norm below 1e-6."""
  norm = inverse_norm(z)
  unit = _f32(z) * norm[:, None]
  norm = jnp.where(jnp.square(norm) < 1 / EPSILON, norm, 0.0)
  return norm[:, None] * (d - unit * jnp.sum(unit * d, axis=1, keepdims=True))


# The tile loops.


def tile_sizes(n, m, both=False, triangle=False):
  """A tile of logits takes at most 2 MiB, or 4 where it serves both of its sides.

  A triangle of few tiles wastes more on its diagonal, where a tile is its own mirror.
  """
  if triangle:
    return (min(n, 1024 if n >= 4096 else 512),) * 2
  return min(n, 1024 if both else 512), min(m, 1024)


def tile_table(n, m, tile_n, tile_m, triangle=False):
  rows, cols = -(-n // tile_n), -(-m // tile_m)
  table = [(i, j) for i in range(rows) for j in range(cols) if j >= i or not triangle]
  return np.array(table, np.int32)


def take(side, i, size):
  """Tile i of a side, and the mask of its rows that an earlier tile has not covered."""
  n = side.z.shape[0]
  tile = jax.tree.map(
    lambda a: jax.lax.dynamic_slice_in_dim(a, i * size, size), side
  )  # the start of the last tile is moved back where it would run over the end
  if n % size == 0:
    return tile, None
  return tile, jnp.arange(size) + jnp.minimum(i * size, n - size) >= i * size


def _take_unit(side, i, size):
  """`take`, with the norm in the rows: cheaper than in the logits.

  Not in bfloat16, which would be rounded once more.
  """
  tile, fresh = take(side, i, size)
  if tile.norm is not None and tile.z.dtype == jnp.float32:
    tile = tile._replace(z=tile.z * tile.norm[:, None], norm=None)
  return tile, fresh


def add(a, i, size, tile):
  start = i * size
  old = jax.lax.dynamic_slice_in_dim(a, start, size)
  return jax.lax.dynamic_update_slice_in_dim(a, old + tile, start, 0)


def product(a, b, dims):
  """Contraction of two tiles, accumulated in float32."""
  return jax.lax.dot_general(
    a,
    b,
    (dims, ((), ())),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def _exact_product(x, y):
  """The inner products of rows, each as a sum of two: exact, and a small rest.

  On a grid of 2^-10 of each row's norm the products' sum is exact, however it is
  added up, and what the grid leaves is so small that its rounding does not count.
  """

  def split(z):
    far = 8192 * jnp.sqrt(jnp.sum(jnp.square(z), axis=1, keepdims=True))
    coarse = (z + far) - far
    return coarse, z - coarse

  (coarse_x, rest_x), (coarse_y, rest_y) = split(x), split(y)
  rest_x = jnp.concatenate([rest_x, coarse_x], axis=1)
  rest_y = jnp.concatenate([y, rest_y], axis=1)
  rest = product(rest_x, rest_y, ((1,), (1,)))
  return product(coarse_x, coarse_y, ((1,), (1,))), rest


def _similarities(x, y, fresh_x, fresh_y):
  """The similarities, what is to be added to them where they are exact, the mask."""
  rest = None
  if x.labels is not None and x.z.dtype == jnp.float32:
    c, rest = _exact_product(x.z, y.z)
  else:
    c = product(x.z, y.z, ((1,), (1,)))
  if x.norm is not None:
    c *= x.norm[:, None]
  if y.norm is not None:
    c *= y.norm[None, :]
  keep = None
  if x.ids is not None:
    keep = x.ids[:, None] != y.ids[None, :]
  for fresh in (fresh_x, None), (None, fresh_y):
    if fresh != (None, None):
      line = fresh[0][:, None] if fresh[0] is not None else fresh[1][None, :]
      keep = jnp.broadcast_to(line, c.shape) if keep is None else keep & line
  return (c, rest), keep


def _minus(c, reference):
  c, rest = c
  c = c if reference is None else c - reference  # exact, where they are close
  return c if rest is None else c + rest


def _logits(c, keep, scale, reference, x, y):
  s = scale * _minus(c, reference)
  if x.bias is not None:
    s += x.bias[:, None]
  if y.bias is not None:
    s += y.bias[None, :]
  return s if keep is None else jnp.where(keep, s, -jnp.inf)


def _finite(m):
  return jnp.where(m == -jnp.inf, 0.0, m)


def _merge(stats, i, size, s, axis, weight):
  """Adds the logits of a tile to the running maximum and sum of its lines."""
  top, total = stats
  old_top = jax.lax.dynamic_slice_in_dim(top, i * size, size)
  old_total = jax.lax.dynamic_slice_in_dim(total, i * size, size)
  new_top = jnp.maximum(old_top, jnp.max(s, axis=axis))
  shift = _finite(new_top)
  e = jnp.exp(s - jnp.expand_dims(shift, axis))
  new_total = old_total * jnp.exp(old_top - shift) + weight * jnp.sum(e, axis=axis)
  return (
    jax.lax.dynamic_update_slice_in_dim(top, new_top, i * size, 0),
    jax.lax.dynamic_update_slice_in_dim(total, new_total, i * size, 0),
  )


def zeros(shape, like):
  """float32, varying over the same axes as another array."""
  return vary(jnp.zeros(shape, jnp.float32), tuple(sorted(varying(like))))


def _no_logits(side, bounded):
  total = zeros(side.z.shape[:1], side.z)
  return (total if bounded else total - jnp.inf), total


def _forward(x, y, scale, bounded, rows, cols, triangle=False):
  """Adds all tiles to the running maxima and sums of the rows and of the columns.

  cols is None where the columns have no softmax. triangle: x and y are one side, and
  each pair of tiles is computed once. bounded: True if no logit needs a maximum.
  """
  n, m = x.z.shape[0], y.z.shape[0]
  tile_n, tile_m = tile_sizes(n, m, cols is not None, triangle)

  def step(carry, ij):
    rows, cols = carry
    i, j = ij
    tile_x, fresh_x = _take_unit(x, i, tile_n)
    tile_y, fresh_y = _take_unit(y, j, tile_m)
    c, keep = _similarities(tile_x, tile_y, fresh_x, fresh_y)
    # A tile on the diagonal of a symmetric matrix is its own mirror image: it counts
    # half as rows and half as columns.
    weight = jnp.where(i == j, 0.5, 1.0) if triangle else 1.0
    if bounded:
      e = jnp.exp(_logits(c, keep, scale, None, tile_x, tile_y))
      sums = lambda axis: weight * jnp.sum(e, axis=axis)
      rows = rows[0], add(rows[1], i, tile_n, sums(1))
      if triangle:
        rows = rows[0], add(rows[1], j, tile_m, sums(0))
      elif cols is not None:
        cols = cols[0], add(cols[1], j, tile_m, sums(0))
      return (rows, cols), None
    s = _logits(c, keep, scale, tile_x.stats.reference[:, None], tile_x, tile_y)
    rows = _merge(rows, i, tile_n, s, 1, weight)
    if triangle or cols is not None:
      s = _logits(c, keep, scale, tile_y.stats.reference[None, :], tile_x, tile_y)
    if triangle:
      rows = _merge(rows, j, tile_m, s, 0, weight)
    elif cols is not None:
      cols = _merge(cols, j, tile_m, s, 0, weight)
    return (rows, cols), None

  table = tile_table(n, m, tile_n, tile_m, triangle)
  return jax.lax.scan(step, (rows, cols), (table[:, 0], table[:, 1]))[0]


def _no_gradients(x, y, both=False):
  """Zeros for `_backward`: the gradients of x, y, of the scale and of the bias."""
  bias = [side for side in (x, y)[: 2 if both else 1] if side.bias is not None]
  return (
    zeros(x.z.shape, x.z),
    zeros(y.z.shape, x.z) if both else None,
    zeros((), x.z),
    zeros(bias[0].bias.shape, x.z) if bias else None,
  )


def _backward(x, y, carry, *, scale, bounded, center, triangle=False):
  """Adds sums over j of w_ij y_j, over i of w_ij x_i, and of w_ij (c_ij - center).

  w_ij is the derivative in s_ij of the sum of g * lse over the softmaxes of the rows
  (where x has stats) and of the columns (where y has). The sums over i are left out
  where the carry has no place for them.
  """
  n, m = x.z.shape[0], y.z.shape[0]
  tile_n, tile_m = tile_sizes(n, m, carry[1] is not None, triangle)

  def probabilities(c, keep, axis, stats, x, y):
    line = lambda a: jnp.expand_dims(a, axis)
    s = _logits(c, keep, scale, line(stats.reference), x, y)
    return line(stats.weight) * jnp.exp(s - line(stats.top))

  def step(carry, ij):
    dx, dy, dscale, dbias = carry
    i, j = ij
    tile_x, fresh_x = _take_unit(x, i, tile_n)
    tile_y, fresh_y = _take_unit(y, j, tile_m)
    c, keep = _similarities(tile_x, tile_y, fresh_x, fresh_y)
    w = 0.0
    if bounded:
      if x.stats is not None:
        w += tile_x.stats.weight[:, None]
      if y.stats is not None:
        w += tile_y.stats.weight[None, :]
      w *= jnp.exp(_logits(c, keep, scale, None, tile_x, tile_y))
    else:
      if x.stats is not None:
        w += probabilities(c, keep, 1, tile_x.stats, tile_x, tile_y)
      if y.stats is not None:
        w += probabilities(c, keep, 0, tile_y.stats, tile_x, tile_y)
    if x.labels is not None:
      target = tile_x.stats.weight[:, None] + tile_y.stats.weight[None, :]
      same = tile_x.labels[:, None] == tile_y.labels[None, :]
      w -= jnp.where(keep & same, target, 0.0)
    if triangle:
      w *= jnp.where(i == j, 0.5, 1.0)
    dscale += jnp.sum(w * _minus(c, center))
    if dbias is not None:
      if x.bias is not None:
        dbias = add(dbias, i, tile_n, jnp.sum(w, axis=1))
      else:
        dbias = add(dbias, j, tile_m, jnp.sum(w, axis=0))
    w_y = w if tile_y.norm is None else w * tile_y.norm[None, :]
    dx = add(dx, i, tile_n, product(w_y.astype(y.z.dtype), tile_y.z, ((1,), (0,))))
    if triangle or dy is not None:
      w_x = w if tile_x.norm is None else w * tile_x.norm[:, None]
      mirror = product(w_x.astype(x.z.dtype), tile_x.z, ((0,), (0,)))
      if triangle:
        dx = add(dx, j, tile_m, mirror)
      else:
        dy = add(dy, j, tile_m, mirror)
    return (dx, dy, dscale, dbias), None

  table = tile_table(n, m, tile_n, tile_m, triangle)
  return jax.lax.scan(step, carry, (table[:, 0], table[:, 1]))[0]
