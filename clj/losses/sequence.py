"""Contrastive predictive coding: the future of a sequence among other moments."""

import jax
import jax.numpy as jnp

from clj.losses import rows, softmax


def cpc(
  context: jax.Array,
  encoded: jax.Array,
  predictors: jax.Array,
  temperature: float = 1.0,
  *,
  negatives: tuple[jax.Array, jax.Array] | None = None,
  reduction: str = "mean",
  axis_name=None,
) -> jax.Array:
  """CPC (arXiv:1807.03748, equations 3 and 4). Takes the embeddings as given.

  For every step k of 1 to K and every moment t with a full future, the cross-entropy of
  z_{t+k} among negatives, by the bilinear score z' W_k c_t / temperature.

  Args:
    context: `[B, S, d_c]`, c. encoded: `[B, S, d_z]`, z.
    predictors: `[K, d_z, d_c]`, one W a step, without bias.
    temperature: 1 in the paper. The code CPC_audio takes the mean over dimensions in
      place of the sum: temperature d_z.
    negatives: `(rows, times)`, each int `[B, n, S - K]`: for every moment the n moments
      whose encodings are its negatives, at every step. By default all other moments t+k
      of the batch at the same step are, through the tiled primitive.
    reduction: "mean" over steps and moments; "steps": the mean of each step, `[K]`,
      which CPC_audio adds up; or "none": `[K, B, S - K]`.
    axis_name: local shards of sequences inside a `shard_map` or `pmap`, the `rows` of
      `negatives` counted in the whole batch. The mean over the axis is the loss, the
      gradient that of the sum over the axis.
  """
  steps, window = len(predictors), context.shape[1] - len(predictors)
  if window < 1:
    raise ValueError(f"{steps} steps ahead need more than {context.shape[1]} moments")

  def one_step(k):
    predicted = _apply(context[:, :window], predictors[k])
    future = encoded[:, k + 1 : k + 1 + window]
    if negatives is None:
      flat = lambda x: x.reshape(-1, x.shape[-1])
      against = softmax.log_sum_exp(
        flat(predicted),
        flat(future),
        1 / temperature,
        aligned=True,
        axis_name=axis_name,
      ).reshape(predicted.shape[:2])
    else:
      row, time = negatives
      predicted = rows.accurate(predicted)
      positive = jnp.sum(predicted * rows.accurate(future), axis=-1)
      drawn = rows.gather(rows.accurate(encoded), axis_name)[row, time]
      logits = jnp.einsum("btd,bntd->bnt", predicted, drawn, precision="highest")
      logits = (logits - positive[:, None]) / temperature
      against = jax.nn.logsumexp(logits, axis=1)
    return jax.nn.softplus(against)

  values = jnp.stack([one_step(k) for k in range(steps)])
  if reduction == "steps":
    return values.mean(axis=(1, 2))
  return rows.reduce(values, reduction, axis_name=axis_name)


def _apply(context, predictor):
  product = jnp.einsum("btc,zc->btz", context, predictor, precision="highest")
  return product.astype(context.dtype)
