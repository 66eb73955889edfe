"""Losses against a teacher's output: BYOL, SwAV, DINO, iBOT, Gram anchoring.

The teacher's side never gets a gradient: it is stopped in here. Views and crops lie on
axis 1, as everywhere in clj. What couples the batch are the targets, Sinkhorn-Knopp and
the centre, and Gram anchoring across images, which have a form for `pmap` and
`shard_map` (`axis_name`); the other losses are sums over rows, whose mean over devices
needs no form of its own.
"""

import jax
import jax.numpy as jnp
from jax import lax

from clj.losses import rows, softmax


def byol(
  prediction: jax.Array, target: jax.Array, *, reduction: str = "mean"
) -> jax.Array:
  """BYOL (arXiv:2006.07733, equation 2). Normalises both, `[B, d]`.

  |p/|p| - t/|t||^2 = 2 - 2 cos, between 0 and 4, for one direction; the paper's loss
  sums the two. The target is stopped. reduction: "mean", "sum" or "none" (`[B]`).
  """
  difference = _unit(prediction) - lax.stop_gradient(_unit(target))
  return rows.reduce(jnp.sum(jnp.square(difference), axis=-1), reduction)


def sinkhorn(
  scores: jax.Array,
  epsilon: float = 0.05,
  iterations: int = 3,
  *,
  mask: jax.Array | None = None,
  axis_name=None,
) -> jax.Array:
  """Sinkhorn-Knopp codes (arXiv:2006.09882, section 3.1), stopped.

  exp(scores / epsilon), alternately scaled so that the columns sum to the same and the
  rows sum to one; the last scaling is that of the rows. Done in logarithms, so that no
  score over- or underflows; SwAV and DINOv2, which agree with it, exponentiate as is
  (DINOv2 calls epsilon the teacher's temperature).

  Args:
    scores: `[B, K]`, rows and prototypes.
    mask: `[B]` bool, rows that take part; the codes of others are zero.
    axis_name: of a `pmap` or `shard_map` whose devices hold `[B / n, K]` each; the
      marginals are of the whole batch.
  Returns: `[B, K]` float32.
  """
  log_q = lax.stop_gradient(rows.accurate(scores)) / epsilon
  if mask is not None:
    log_q = jnp.where(mask[:, None], log_q, -jnp.inf)
  if mask is None:
    batch = rows.count(log_q, axis_name)
  else:
    batch = jnp.maximum(rows.total(mask.sum().astype(log_q.dtype), axis_name), 1)

  def over_batch(x):
    """log sum exp over the rows of the whole batch, `[1, K]`."""
    peak = x.max(0, keepdims=True)
    if axis_name is not None:
      peak = softmax.vary(lax.pmax(peak, axis_name), axis_name)
    peak = jnp.where(jnp.isfinite(peak), peak, 0)
    sums = rows.total(jnp.exp(x - peak).sum(0, keepdims=True), axis_name)
    return jnp.where(sums > 0, jnp.log(sums) + peak, 0)

  log_q -= jax.nn.logsumexp(over_batch(log_q), axis=1, keepdims=True)
  for _ in range(iterations):
    log_q -= over_batch(log_q) + jnp.log(log_q.shape[1])
    sums = jax.nn.logsumexp(log_q, axis=1, keepdims=True) + jnp.log(batch)
    log_q -= jnp.where(jnp.isfinite(sums), sums, 0)
  return jnp.exp(log_q + jnp.log(batch))


def swav_codes(
  scores: jax.Array,
  queue_scores: jax.Array | None = None,
  epsilon: float = 0.05,
  iterations: int = 3,
  *,
  axis_name=None,
) -> jax.Array:
  """The codes of the global crops, each crop by itself, stopped.

  Args:
    scores: `[B, G, K]`, of embeddings and prototypes on the sphere.
    queue_scores: `[L, G, K]`, scores of each crop's queue under today's prototypes:
      they take part in Sinkhorn-Knopp and are left out of the result.
    axis_name: see `sinkhorn`; every device then brings its own part of the queue.
  Returns: `[B, G, K]` float32, rows that sum to one.
  """
  batch = len(scores)
  if queue_scores is not None:
    queue_scores = queue_scores.astype(scores.dtype)
    scores = jnp.concatenate([queue_scores, scores])
  crops = range(scores.shape[1])
  codes = [
    sinkhorn(scores[:, g], epsilon, iterations, axis_name=axis_name) for g in crops
  ]
  return jnp.stack(codes, axis=1)[-batch:]


def swav(
  scores: jax.Array,
  codes: jax.Array,
  temperature: float = 0.1,
  *,
  reduction: str = "mean",
) -> jax.Array:
  """Swapped prediction (arXiv:2006.09882, equation 2). Takes the scores as given.

  The cross-entropy between the code of each global crop and the prediction of each
  other crop, averaged over these pairs and the batch.

  Args:
    scores: `[B, V, K]`, all crops, the global ones first.
    codes: `[B, G, K]`, from `swav_codes`; stopped.
    reduction: "mean", "sum" or "none" (`[B]`).
  """
  return dino(scores, codes, temperature, reduction=reduction)


def push(queue: jax.Array, new: jax.Array) -> jax.Array:
  """SwAV's queue: `new` `[B, ...]` comes first, the last B rows of `[L, ...]` go."""
  if len(new) > len(queue):
    raise ValueError(f"{len(new)} new rows do not fit a queue of {len(queue)}")
  new = lax.stop_gradient(new).astype(queue.dtype)
  return jnp.concatenate([new, queue[: len(queue) - len(new)]])


def center_target(
  teacher: jax.Array, center: jax.Array, temperature: float
) -> jax.Array:
  """DINO's target (arXiv:2104.14294, equation 1): softmax((teacher - center) / T).

  teacher `[..., K]`, center `[K]` or broadcastable; stopped, float32. The other kind of
  target is `sinkhorn(teacher, temperature)`.
  """
  logits = (rows.accurate(teacher) - _like(center, teacher)) / temperature
  return lax.stop_gradient(jax.nn.softmax(logits, axis=-1))


def update_center(
  center: jax.Array, teacher: jax.Array, momentum: float = 0.9, *, axis_name=None
) -> jax.Array:
  """DINO's centre after a step (equation 4): the moving average of the mean output.

  teacher `[..., K]`, raw outputs, center `[K]` (or leading ones). DINO v1 and iBOT use
  it from the next step on; DINOv2 applies it lazily, which comes to the same.
  """
  outputs = rows.accurate(teacher).reshape(-1, teacher.shape[-1])
  size = rows.count(outputs, axis_name)
  mean = rows.total(outputs.sum(0), axis_name) / size
  new = momentum * center + (1 - momentum) * mean.reshape(center.shape)
  return lax.stop_gradient(new).astype(center.dtype)


def dino(
  student: jax.Array,
  target: jax.Array,
  temperature: float = 0.1,
  *,
  pairs: str = "v1",
  reduction: str = "mean",
) -> jax.Array:
  """DINO (arXiv:2104.14294, equation 3). Takes the student's logits as given.

  The cross-entropy of each student view with the target of each teacher view.

  Args:
    student: `[B, V, K]` logits, the views that the teacher saw too first.
    target: `[B, G, K]` probabilities, from `center_target` or `sinkhorn`; stopped.
    pairs: "v1": pairs of the same view are left out and the mean over the others is
      taken, as in DINO and iBOT. "v2": the sum over all pairs, as the DINOv2 class has
      it, whose caller selects views and divides.
    reduction: "mean", "sum" or "none" (`[B]`).
  """
  log_p = jax.nn.log_softmax(rows.accurate(student) / temperature, axis=-1)
  target = lax.stop_gradient(rows.accurate(target))
  entropies = -jnp.einsum("bgk,bvk->bgv", target, log_p, precision="highest")
  views = entropies.shape[1:]
  if pairs == "v1":
    other = ~jnp.eye(*views, dtype=bool)
    values = jnp.sum(jnp.where(other, entropies, 0), axis=(1, 2)) / other.sum()
  elif pairs == "v2":
    values = entropies.sum(axis=(1, 2))
  else:
    raise ValueError(f'pairs is "v1" or "v2", not {pairs!r}')
  return rows.reduce(values, reduction)


def ibot(
  student: jax.Array, target: jax.Array, mask: jax.Array, temperature: float = 0.1
) -> jax.Array:
  """iBOT's patch loss (arXiv:2111.07832, equation 2). Takes the logits as given.

  Per image the mean over its masked patches of the cross-entropy with the target of the
  same patch of the same view; then the mean over images. An image without a masked
  patch adds nothing but counts in that mean, as in the official code.

  Args:
    student: `[B, N, K]` logits; crops are further rows. `target`: `[B, N, K]`
      probabilities; stopped.
    mask: `[B, N]` bool, True where the student's patch was masked.
  """
  flat = lambda x: x.reshape(-1, x.shape[-1])
  weight = masked_weights(mask).reshape(-1)
  return ibot_tokens(flat(student), flat(target), weight, len(mask), temperature)


def ibot_tokens(
  student: jax.Array,
  target: jax.Array,
  weight: jax.Array,
  images: int,
  temperature: float = 0.1,
) -> jax.Array:
  """`ibot` on the masked patches alone, `[M, K]`, so that heads run on those only.

  Args:
    weight: `[M]`, 1 / (masked patches of this patch's image), from `masked_weights`; 0
      for rows that only fill the array: their values, even NaN, play no part.
    images: what the weighted sum is divided by, images without a masked patch included.
  """
  used = (weight > 0)[:, None]
  logits = jnp.where(used, rows.accurate(student), 0) / temperature
  target = lax.stop_gradient(jnp.where(used, rows.accurate(target), 0))
  entropy = -jnp.sum(target * jax.nn.log_softmax(logits, axis=-1), axis=-1)
  return jnp.sum(weight * entropy) / images


def masked_weights(mask: jax.Array) -> jax.Array:
  """`[B, N]`: 1 / (masked patches of the image) at masked patches, 0 elsewhere."""
  each = 1 / jnp.maximum(mask.sum(-1, keepdims=True), 1).astype(jnp.float32)
  return jnp.where(mask, each, 0)


def gram(
  student: jax.Array,
  teacher: jax.Array,
  *,
  level: str = "image",
  negatives: str = "keep",
  normalize: bool = True,
  axis_name=None,
) -> jax.Array:
  """Gram anchoring (DINOv3, arXiv:2508.10104, section 4.2). Normalises both.

  The mean squared difference of the matrices of all patch similarities of student and
  teacher. The paper has the Frobenius norm, which the official code divides by the
  number of entries.

  Args:
    student, teacher: `[B, N, d]` and `[B, N, d']` patch features; the teacher is
      stopped.
    level: "image": matrices `[N, N]` within an image. "batch": one of `[B N, B N]`.
    negatives: "keep"; "clip": negative similarities of both count as zero (the default
      of the official class); "clip_teacher": of the teacher alone, which is what the
      official remove_only_teacher_neg comes to.
    normalize: False leaves the features as they are.
    axis_name: local shards of images inside a `shard_map` or `pmap`. The mean over the
      axis is the loss, the gradient that of the sum over the axis.
  """
  if level not in ("image", "batch"):
    raise ValueError(f'level is "image" or "batch", not {level!r}')
  if negatives not in ("keep", "clip", "clip_teacher"):
    raise ValueError(
      f'negatives is "keep", "clip" or "clip_teacher", not {negatives!r}'
    )

  def similarities(x):
    dtype = x.dtype
    if normalize:
      x = _unit(x).astype(dtype)
    if level == "image":
      return rows.dot(x, x.swapaxes(1, 2))
    x = x.reshape(-1, x.shape[-1])
    return rows.dot(x, rows.gather(x, axis_name).T)

  s, t = similarities(student), lax.stop_gradient(similarities(teacher))
  if negatives != "keep":
    t = jax.nn.relu(t)
  if negatives == "clip":
    s = jax.nn.relu(s)
  return jnp.mean(jnp.square(s - t))


def _unit(x):
  x = rows.accurate(x)
  squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * lax.rsqrt(jnp.maximum(squared, 1e-12))


def _like(center, teacher):
  return rows.accurate(jnp.broadcast_to(center.reshape(-1), teacher.shape))
