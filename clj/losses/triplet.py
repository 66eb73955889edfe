"""Triplet losses: given triplets, and triplets mined within a labelled batch.

All take the embeddings as given; most recipes want them on the sphere
(`losses.l2_normalize`). Distances come from differences, not from dot products: mining
is about nearly equal points, where |x|^2 + |y|^2 - 2 x.y has no digits left.

The miners build the distances `[b, B]` of a device's rows to all rows. Which triplets
are meant by one word differs between libraries; each function says whose it is.
"""

import jax
import jax.numpy as jnp

from clj.losses import rows

CHUNK = 2**22  # triplets looked at together


def triplet(
  anchor: jax.Array,
  positive: jax.Array,
  negative: jax.Array,
  margin: float = 1.0,
  *,
  squared: bool = False,
  norm_degree: float = 2,
  eps: float = 1e-6,
  reduction: str = "mean",
) -> jax.Array:
  """max(0, d(a, p) - d(a, n) + margin) of given triplets, rows `[B, d]`.

  d is the distance (sum |a - b|^norm_degree + eps)^(1 / norm_degree) of optax; with
  `squared` it is the squared Euclidean distance of FaceNet (arXiv:1503.03832, equation
  2) and `eps` and `norm_degree` play no part. reduction: "mean", "sum" or "none".
  """

  def distance(other):
    difference = rows.accurate(anchor) - rows.accurate(other)
    if squared:
      return jnp.sum(jnp.square(difference), axis=-1)
    powers = jnp.sum(jnp.abs(difference) ** norm_degree, axis=-1)
    return (powers + eps) ** (1 / norm_degree)

  values = jax.nn.relu(distance(positive) - distance(negative) + margin)
  return rows.reduce(values, reduction)


def triplet_batch_all(
  embedding: jax.Array,
  label: jax.Array,
  margin: float = 0.2,
  *,
  mining: str = "all",
  mining_margin: float | None = None,
  squared: bool = False,
  axis_name=None,
) -> jax.Array:
  """All triplets of a kind in the batch, averaged over those with a loss above zero.

  The batch-all loss of arXiv:1703.07737 (equation 6, its non-zero mean) and, for the
  other kinds, pytorch-metric-learning's TripletMarginMiner with TripletMarginLoss:
  `mining` is "all" (d_an - d_ap <= mining_margin), "hard" (d_an <= d_ap) or "semihard"
  (0 < d_an - d_ap <= mining_margin, every such negative, where `triplet_semihard` takes
  one a pair). That library normalises the embeddings itself. No triplet: 0.

  It looks at B^3 triplets, a few million at a time, and keeps `[b, B]`.

  Args:
    embedding: `[B, d]`. label: `[B]` integers.
    margin: of the loss; `mining_margin` is that of the miner, the same by default.
    squared: squared Euclidean distances instead of Euclidean ones.
    axis_name: of a `pmap` or `shard_map` whose devices hold `[B / n, d]` each. The mean
      over the axis is the loss, the gradient that of the sum over the axis.
  """
  if mining not in ("all", "hard", "semihard"):
    raise ValueError(f'mining is "all", "hard" or "semihard", not {mining!r}')
  reach = margin if mining_margin is None else mining_margin

  def by_anchor(z_bd, label_b, axis_name):
    distance, same, own = _compare(z_bd, label_b, squared, axis_name)
    fixed = jax.lax.stop_gradient(margin), jax.lax.stop_gradient(reach)
    loss, active = _hinge_sums(distance, same & ~own, ~same, *fixed, mining)
    # The derivative by the margin, where it has one, is the number of active triplets.
    loss += (margin - fixed[0]) * jax.lax.stop_gradient(active)
    return jnp.stack([loss, active], axis=1)

  sums = rows.each(by_anchor, embedding, label, axis_name=axis_name)
  loss, active = rows.total(sums.sum(0), axis_name)
  return loss / jnp.maximum(jax.lax.stop_gradient(active), 1)


def triplet_batch_hard(
  embedding: jax.Array,
  label: jax.Array,
  margin: float = 1.0,
  *,
  soft: bool = False,
  squared: bool = False,
  reduction: str = "mean",
  axis_name=None,
) -> jax.Array:
  """The farthest positive and the nearest negative of every anchor.

  arXiv:1703.07737, equation 5, averaged over anchors, as TensorFlow Addons'
  `triplet_hard_loss`: max(0, margin + d_ap - d_an), or with `soft` log(1 + exp(d_ap -
  d_an)) without a margin. As there, an anchor alone in its class has itself as positive
  (distance 0), and one with no negative at all the farthest row as negative. Equally
  far rows share the gradient.

  Args are those of `triplet_batch_all`; reduction: "mean", "sum" or "none" (`[B]`; with
  `axis_name`, this device's rows).
  """

  def by_anchor(z_bd, label_b, axis_name):
    distance, same, own = _compare(z_bd, label_b, squared, axis_name)
    positive, negative = same & ~own, ~same
    farthest = jnp.max(jnp.where(positive, distance, 0), axis=1)
    nearest = jnp.min(jnp.where(negative, distance, jnp.inf), axis=1)
    nearest = jnp.where(negative.any(1), nearest, distance.max(1))
    difference = farthest - nearest
    return jax.nn.softplus(difference) if soft else jax.nn.relu(margin + difference)

  values = rows.each(by_anchor, embedding, label, axis_name=axis_name)
  return rows.reduce(values, reduction, axis_name=axis_name)


def triplet_semihard(
  embedding: jax.Array,
  label: jax.Array,
  margin: float = 1.0,
  *,
  squared: bool = False,
  axis_name=None,
) -> jax.Array:
  """One semi-hard negative for each ordered positive pair.

  FaceNet's mining (arXiv:1503.03832, section 3.2) as TensorFlow Addons'
  `triplet_semihard_loss` does it: the nearest negative that is farther than the
  positive, however far; where there is none, the farthest negative. The mean over all
  positive pairs of max(0, margin + d_ap - d_an), zeros counted. FaceNet and TensorFlow
  Addons' option "squared-L2" use squared distances. A negative at the positive's very
  distance is not semi-hard; of several at one distance the first row is taken. Without
  positive pairs: 0.

  Args are those of `triplet_batch_all`.
  """

  def by_anchor(z_bd, label_b, axis_name):
    distance, same, own = _compare(z_bd, label_b, squared, axis_name)
    positive = same & ~own
    order = jnp.argsort(jnp.where(same, jnp.inf, distance), axis=1, stable=True)
    ordered = jnp.take_along_axis(jnp.where(same, jnp.inf, distance), order, axis=1)
    ordered = jax.lax.stop_gradient(ordered)
    # For every column the place of the first negative beyond it, else of the last one.
    beyond = jax.vmap(lambda row, d: jnp.searchsorted(row, d, side="right"))(
      ordered, jax.lax.stop_gradient(distance)
    )
    negatives = jnp.sum(~same, axis=1, keepdims=True)
    place = jnp.minimum(beyond, jnp.maximum(negatives - 1, 0))
    chosen = jnp.take_along_axis(order, place, axis=1)
    negative = jnp.take_along_axis(distance, chosen, axis=1)
    negative = jnp.where(negatives > 0, negative, 0)
    hinge = jax.nn.relu(margin + distance - negative)
    loss = jnp.sum(jnp.where(positive, hinge, 0), axis=1)
    return jnp.stack([loss, positive.sum(1).astype(loss.dtype)], axis=1)

  sums = rows.each(by_anchor, embedding, label, axis_name=axis_name)
  loss, pairs = rows.total(sums.sum(0), axis_name)
  return loss / jnp.maximum(jax.lax.stop_gradient(pairs), 1)


def _compare(z_bd, label_b, squared, axis_name):
  """Distances, equality of labels and identity of these rows with all, `[b, B]`."""
  z_Bd, label_B = rows.gather(z_bd, axis_name), rows.gather(label_b, axis_name)
  number = rows.first(z_bd, axis_name) + jnp.arange(len(z_bd))
  own = number[:, None] == jnp.arange(len(z_Bd))[None]
  distance = rows.squared_distances(rows.accurate(z_bd), rows.accurate(z_Bd))
  if not squared:
    # The gradient at coinciding rows is zero, not infinite.
    apart = distance > 0
    distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, distance, 1)), 0)
  return distance, label_b[:, None] == label_B[None], own


def _hinge_sums(distance, positive, negative, margin, reach, mining):
  """Per anchor: the sum of the mined triplets' losses, and how many are above zero."""

  def active(d_ap, d_an):
    if mining == "hard":
      mined = d_an <= d_ap
    elif mining == "all":
      mined = d_an - d_ap <= reach
    else:
      mined = (d_an > d_ap) & (d_an - d_ap <= reach)
    return mined & (d_ap - d_an + margin > 0)

  def by_chunk(distance, positive, negative):
    def one_anchor(row):
      d, p, n = row
      on = active(d[:, None], d[None]) & p[:, None] & n[None]
      hinge = jnp.where(on, d[:, None] - d[None] + margin, 0)
      slope = on.sum(1) - on.sum(0)  # of the anchor's loss by its distances
      return hinge.sum(), on.sum().astype(d.dtype), slope.astype(d.dtype)

    at_once = max(1, CHUNK // distance.shape[1] ** 2)
    return jax.lax.map(one_anchor, (distance, positive, negative), batch_size=at_once)

  @jax.custom_vjp
  def sums(distance, positive, negative):
    return by_chunk(distance, positive, negative)[:2]

  def forward(distance, positive, negative):
    loss, count, slope = by_chunk(distance, positive, negative)
    return (loss, count), slope

  def backward(slope, g):
    return g[0][:, None] * slope, None, None

  sums.defvjp(forward, backward)
  return sums(distance, positive, negative)
