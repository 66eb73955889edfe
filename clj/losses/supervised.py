"""Contrast by labels: any number of positives a row."""

import jax
import jax.numpy as jnp
from jax import lax

from clj.losses import rows, softmax
from clj.losses.contrastive import l2_normalize

TILE = 256  # columns of similarities held at a time


def supcon(
  embedding: jax.Array,
  label: jax.Array,
  temperature: float = 0.1,
  *,
  base_temperature: float | None = None,
  reduction: str = "mean",
  axis_name=None,
) -> jax.Array:
  """Supervised contrastive loss (arXiv:2004.11362, equation 2, "out").

  Takes the embeddings as given; the paper's are normalised. For each row, the mean over
  its positives of the cross-entropy among all other rows, positives included. A row
  without a positive counts as zero.

  Args:
    embedding: `[B, d]`; views of an example are rows of their own.
    label: `[B]` int.
    base_temperature: the official code multiplies by temperature / base_temperature
      (0.07 there); left out here by default.
    reduction: "mean", "sum" or "none" (`[B]`).
    axis_name: local shards inside a `shard_map` or `pmap`. The mean over the axis is
      the loss, the gradient that of the sum over the axis.
  """
  group = _groups(rows.gather(label, axis_name))
  own = lax.dynamic_slice_in_dim(group, rows.first(label, axis_name), len(label))
  z = rows.accurate(embedding)
  many = rows.count(z, axis_name)
  sums = rows.total(jax.ops.segment_sum(z, own, many), axis_name)[own]
  sizes = jax.ops.segment_sum(jnp.ones_like(group), group, many)[own]
  positives = (sizes - 1).astype(z.dtype)
  # The mean similarity of the positives is what the log-sum-exp is relative to.
  mean = jnp.sum(z * (sums - z), axis=1) / jnp.maximum(positives, 1)
  values = softmax.log_sum_exp_labels(
    embedding,
    1 / temperature,
    labels=label,
    positives=positives,
    reference=mean,
    axis_name=axis_name,
  )
  values = jnp.where(positives > 0, values, 0)
  if base_temperature is not None:
    values = values * (temperature / base_temperature)
  return rows.reduce(values, reduction, axis_name=axis_name)


def nt_xent_labels(
  embedding: jax.Array, label: jax.Array, temperature: float = 0.07, *, axis_name=None
) -> jax.Array:
  """NT-Xent over all pairs of one label, as optax has it. Normalises its rows.

  For every ordered pair of two rows of one label the cross-entropy of that positive
  among the rows of other labels: the other positives are not in the denominator, where
  `supcon` has them. The mean over pairs; without any, 0. With two rows a label it is
  `nt_xent`.

  Args are those of `supcon`.
  """
  z = l2_normalize(embedding)
  negatives = softmax.log_sum_exp(
    z, z, 1 / temperature, row_ids=label, col_ids=label, axis_name=axis_name
  )

  def by_row(z_bd, label_b, negatives_b, axis_name):
    z_Bd, label_B = rows.gather(z_bd, axis_name), rows.gather(label_b, axis_name)
    number = rows.first(z_bd, axis_name) + jnp.arange(len(z_bd))

    @jax.checkpoint
    def add(z, label, column):
      logits = rows.dot(z_bd, z.T) / temperature
      pair = (label_b[:, None] == label[None]) & (number[:, None] != column[None])
      pair &= column[None] < len(z_Bd)
      losses = jax.nn.softplus(negatives_b[:, None] - logits)
      loss = jnp.sum(jnp.where(pair, losses, 0), axis=1)
      return jnp.stack([loss, pair.sum(1).astype(loss.dtype)], axis=1)

    tile = min(TILE, len(z_Bd))
    extra = -len(z_Bd) % tile
    columns = (
      jnp.pad(z_Bd, ((0, extra), (0, 0))).reshape(-1, tile, z_Bd.shape[1]),
      jnp.pad(label_B, (0, extra)).reshape(-1, tile),
      jnp.arange(len(z_Bd) + extra).reshape(-1, tile),
    )
    return lax.map(lambda one: add(*one), columns).sum(0)

  sums = rows.each(by_row, z, label, negatives, axis_name=axis_name)
  loss, pairs = rows.total(sums.sum(0), axis_name)
  return loss / jnp.maximum(lax.stop_gradient(pairs), 1)


def _groups(label):
  """`[B]`: the number of each row's label among the labels in order, 0 to B - 1."""
  order = jnp.argsort(label)
  ordered = label[order]
  starts = jnp.concatenate([jnp.zeros(1, bool), ordered[1:] != ordered[:-1]])
  return jnp.zeros(len(label), jnp.int32).at[order].set(jnp.cumsum(starts))
