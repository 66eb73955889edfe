"""Losses on the statistics of a batch: Barlow Twins, VICReg, KoLeo.

None of them has negatives; what couples the batch is a mean, a covariance or a nearest
neighbour. Under `jit` these run over the whole sharded batch by themselves. Products
take operands of the input's dtype; statistics and results are float32.
"""

import jax
import jax.numpy as jnp

from clj.losses import rows, softmax

TILE = 512  # columns of distances held at a time


def barlow_twins(
  z1: jax.Array,
  z2: jax.Array,
  lambd: float = 0.0051,
  *,
  eps: float = 1e-5,
  groups: int = 1,
  axis_name=None,
) -> jax.Array:
  """Barlow Twins (arXiv:2103.03230, equation 1). Takes the embeddings as given.

  Each column is standardised over the batch (biased variance, `eps` added to it, no
  affine part; the gradient runs through both statistics), C = z1' z2 / B, and the loss
  is the plain sum over i of (C_ii - 1)^2 plus `lambd` times that over i != j of C_ij^2.

  Args:
    z1, z2: `[B, d]`, the two views.
    groups: standardise each of this many contiguous groups of rows by itself, as
      processes without synchronised batch norm do. Such a run of the official code on
      `groups` processes has this loss on each of them. Its all-reduce of C is not
      differentiated, so that averaging the processes' gradients, as DDP does, leaves
      1 / groups of the gradient given here; the Adam and LARS-adapted parts of an
      optimiser do not see that factor, others do.
    axis_name: of a `pmap` or `shard_map` whose devices hold `[B / n, d]` each. The mean
      over the axis is the loss, the gradient that of the sum over the axis.
  """
  if groups > 1 and axis_name is not None:
    raise ValueError(f"groups={groups} is for the global view: leave axis_name out")
  batch = rows.count(z1, axis_name)
  if batch % groups:
    raise ValueError(f"{groups} groups do not divide a batch of {batch}")

  def standardise(z):
    z = rows.accurate(z)
    z = z.reshape(groups, len(z) // groups, -1)
    size = batch // groups
    centred = z - rows.total(z.sum(1, keepdims=True), axis_name) / size
    variance = rows.total(jnp.square(centred).sum(1, keepdims=True), axis_name) / size
    return (centred * jax.lax.rsqrt(variance + eps)).reshape(z1.shape)

  a, b = standardise(z1).astype(z1.dtype), standardise(z2).astype(z2.dtype)
  c = rows.total(rows.dot(a.T, b), axis_name) / batch
  on_diagonal = jnp.eye(len(c), dtype=bool)
  return jnp.sum(jnp.where(on_diagonal, jnp.square(c - 1), lambd * jnp.square(c)))


def vicreg(
  z1: jax.Array,
  z2: jax.Array,
  invariance_weight: float = 25.0,
  variance_weight: float = 25.0,
  covariance_weight: float = 1.0,
  *,
  gamma: float = 1.0,
  eps: float = 1e-4,
  axis_name=None,
) -> jax.Array:
  """VICReg (arXiv:2105.04906, equation 6): the weighted sum of `vicreg_terms`.

  Takes the embeddings `[B, d]` as given. The weights are the paper's lambda, mu and nu,
  called sim_coeff, std_coeff and cov_coeff in the official code.
  """
  invariance, variance, covariance = vicreg_terms(
    z1, z2, gamma=gamma, eps=eps, axis_name=axis_name
  )
  return (
    invariance_weight * invariance
    + variance_weight * variance
    + covariance_weight * covariance
  )


def vicreg_terms(
  z1: jax.Array,
  z2: jax.Array,
  *,
  gamma: float = 1.0,
  eps: float = 1e-4,
  axis_name=None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The three unweighted terms of VICReg, as the official code has them.

  Invariance: mean over rows and columns of (z1 - z2)^2, where the paper's equation 5
  sums over columns. Variance: mean over columns of max(0, gamma - sqrt(var + eps)),
  unbiased variance, averaged over the two views (each halved). Covariance: squared
  entries off the diagonal of the covariance matrix (by B - 1), summed, over d, summed
  over the two views (not halved).

  Args:
    z1, z2: `[B, d]`, B at least 2.
    axis_name: of a `pmap` or `shard_map` whose devices hold `[B / n, d]` each; the
      invariance is then this device's own, the statistics are of the whole batch, as
      in the official code on several processes. The mean over the axis is the loss,
      the gradient that of the sum over the axis.
  """
  batch, width = rows.count(z1, axis_name), z1.shape[1]
  if batch < 2:
    raise ValueError("VICReg needs two rows for a variance, got a batch of 1")
  invariance = jnp.mean(jnp.square(rows.accurate(z1) - rows.accurate(z2)))
  off_diagonal = ~jnp.eye(width, dtype=bool)
  variance = covariance = 0.0
  for z in (z1, z2):
    mean = rows.total(rows.accurate(z).sum(0, keepdims=True), axis_name) / batch
    centred = (rows.accurate(z) - mean).astype(z.dtype)
    cov = rows.total(rows.dot(centred.T, centred), axis_name) / (batch - 1)
    std = jnp.sqrt(jnp.diagonal(cov) + eps)
    variance += jnp.mean(jax.nn.relu(gamma - std)) / 2
    covariance += jnp.sum(jnp.where(off_diagonal, jnp.square(cov), 0)) / width
  return invariance, variance, covariance


def koleo(
  x: jax.Array,
  *,
  eps: float = 1e-8,
  groups: int = 1,
  reduction: str = "mean",
  axis_name=None,
) -> jax.Array:
  """KoLeo (arXiv:1806.03198, equation 2) as DINOv2 has it. Normalises its rows.

  Minus the mean logarithm of the distance of each row to its nearest other row:
  -log(|x_i - x_n(i) + eps| + eps). The gradient runs through both ends. Neighbours are
  found by differences, not by dot products, so that those of nearly equal rows are
  right; of several at the same distance the first row of the batch is taken, wherever
  it lies. A batch of one is its own neighbour and stays finite.

  Args:
    x: `[B, d]`, raw.
    groups: look for the neighbour within each of this many contiguous groups of rows
      only. The official code looks within one process's rows: `groups` is the number
      of processes that reproduces it.
    reduction: "mean", "sum" or "none" (`[B]`).
    axis_name: of a `pmap` or `shard_map` whose devices hold `[B / n, d]` each. The mean
      over the axis is the loss, the gradient that of the sum over the axis.
  """
  if groups > 1:
    if axis_name is not None:
      raise ValueError(f"groups={groups} is for the global view: leave axis_name out")
    if len(x) % groups:
      raise ValueError(f"{groups} groups do not divide a batch of {len(x)}")
    x = x.reshape(groups, len(x) // groups, -1)
    alone = lambda one: _koleo_rows(one, eps, None, lambda z: _nearest(z, None))
    each = jax.vmap(alone)(x).reshape(-1)
  else:
    search = lambda z: rows.each(_nearest, z, axis_name=axis_name)
    each = _koleo_rows(x, eps, axis_name, search)
  return rows.reduce(each, reduction, axis_name=axis_name)


def _koleo_rows(x, eps, axis_name, search):
  x = rows.accurate(x)
  # Divided by a square root, which are exact, and not times its approximate inverse:
  # equal rows stay equal to the last bit.
  z = x / jnp.sqrt(jnp.maximum(rows.squared_norms(x), eps**2))
  nearest = search(jax.lax.stop_gradient(z))
  difference = z - rows.gather(z, axis_name)[nearest]
  # Rows that coincide, to rounding, push with 1 / eps, and the pushes cancel in pairs.
  # Added up apart from the others, they cancel exactly instead of drowning them.
  squared = jnp.sum(jnp.square(difference), axis=1, keepdims=True)
  apart = squared > (2 * jnp.finfo(z.dtype).eps) ** 2
  z = z * 1
  rounding = z - rows.gather(z, axis_name)[nearest]
  zero = rounding - jax.lax.stop_gradient(rounding)
  distance = jnp.linalg.norm(jnp.where(apart, difference, zero) + eps, axis=1)
  return -jnp.log(distance + eps)


def _nearest(z_bd, axis_name):
  """`[b]`: the number of the nearest other row of the batch, the lowest of several."""
  z_Bd = rows.gather(z_bd, axis_name)
  own = rows.first(z_bd, axis_name) + jnp.arange(len(z_bd))
  tile = min(TILE, len(z_Bd))
  tiles = -(-len(z_Bd) // tile)
  padded = jnp.pad(z_Bd, ((0, tiles * tile - len(z_Bd)), (0, 0)))

  def step(best, one):
    best_squared, best_number = best
    columns, start = one
    number = start + jnp.arange(tile)
    squared = rows.squared_distances(z_bd, columns)
    other = (number[None] != own[:, None]) & (number[None] < len(z_Bd))
    squared = jnp.where(other, squared, jnp.inf)
    least, number = squared.min(1), start + squared.argmin(1)
    # Strictly less: of equal distances the earlier tile's row stays.
    closer = least < best_squared
    return (
      jnp.where(closer, least, best_squared),
      jnp.where(closer, number, best_number),
    ), None

  start = (jnp.full(len(z_bd), jnp.inf, z_bd.dtype), jnp.zeros(len(z_bd), own.dtype))
  if axis_name is not None:
    start = tuple(softmax.vary(x, axis_name) for x in start)
  columns = padded.reshape(tiles, tile, -1), jnp.arange(tiles) * tile
  (_, number), _ = jax.lax.scan(step, start, columns)
  return number
