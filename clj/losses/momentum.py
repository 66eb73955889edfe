"""MoCo: InfoNCE against the keys of a momentum encoder, with and without a queue."""

import jax
import jax.numpy as jnp
from jax import lax

from clj.losses import rows, softmax
from clj.losses.contrastive import l2_normalize


def moco(
  query: jax.Array,
  key: jax.Array,
  queue: jax.Array,
  temperature: float = 0.07,
  *,
  reduction: str = "mean",
) -> jax.Array:
  """MoCo v1 and v2 (arXiv:1911.05722, equation 1). Normalises query and key.

  One positive, the own key, among the keys of the queue; the other keys of the batch
  are no negatives. Keys and queue are stopped. Each row stands alone, so that the mean
  over devices of local values is the global loss without any further form.

  Args:
    query, key: `[B, d]`, raw.
    queue: `[K, d]`, rows of norm one, as `enqueue` leaves them; taken as given. (The
      official code keeps it transposed.)
    temperature: 0.07 in v1, 0.2 in v2.
    reduction: "mean", "sum" or "none" (`[B]`).
  """
  query, key = l2_normalize(query), lax.stop_gradient(l2_normalize(key))
  positive = jnp.sum(rows.accurate(query) * rows.accurate(key), axis=1)
  against = softmax.log_sum_exp(
    query, lax.stop_gradient(queue), 1 / temperature, reference=positive
  )
  return rows.reduce(jax.nn.softplus(against), reduction)


def enqueue(queue: jax.Array, pointer: jax.Array, key: jax.Array):
  """The queue `[K, d]` and its pointer after a step, first in first out.

  The oldest B rows, from `pointer` on, become the normalised `key` `[B, d]`. Called
  after the loss, whose negatives are those of the steps before.
  """
  if len(queue) % len(key):
    raise ValueError(f"a queue of {len(queue)} is no multiple of the batch {len(key)}")
  key = lax.stop_gradient(l2_normalize(key)).astype(queue.dtype)
  queue = lax.dynamic_update_slice_in_dim(queue, key, pointer, axis=0)
  return queue, (pointer + len(key)) % len(queue)


def moco_v3(
  query1: jax.Array,
  query2: jax.Array,
  key1: jax.Array,
  key2: jax.Array,
  temperature: float = 0.2,
  *,
  reduction: str = "mean",
  axis_name=None,
) -> jax.Array:
  """MoCo v3 (arXiv:2104.02057, algorithm 1). Normalises all four, `[B, d]`.

  ctr(q1, k2) + ctr(q2, k1), each the cross-entropy of a query's own key among the keys
  of the batch, times 2 * temperature as in the paper. Keys are stopped.

  Args:
    query1, query2: the predictor's outputs. key1, key2: the momentum encoder's.
    reduction: "mean", "sum" or "none" (`[B]`, both directions added).
    axis_name: local shards inside a `shard_map` or `pmap`. The value of each device is
      that of its own rows, as on the official code's processes; the mean over the axis
      is the loss, the gradient that of the sum over the axis, so that averaging it, as
      DDP does, is exact.
  """

  def contrast(query, key):
    against = softmax.log_sum_exp(
      query,
      lax.stop_gradient(key),
      1 / temperature,
      aligned=True,
      normalize=True,
      axis_name=axis_name,
    )
    return 2 * temperature * jax.nn.softplus(against)

  values = contrast(query1, key2) + contrast(query2, key1)
  return rows.reduce(values, reduction, axis_name=axis_name)
