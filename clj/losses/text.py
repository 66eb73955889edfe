"""Sentences and passages: SimCSE and the in-batch NLL of dense retrieval."""

import jax
import jax.numpy as jnp

from clj.losses import rows, softmax
from clj.losses.contrastive import l2_normalize


def simcse(
  z1: jax.Array,
  z2: jax.Array,
  temperature: float = 0.05,
  *,
  negative: jax.Array | None = None,
  negative_weight: float = 0.0,
  reduction: str = "mean",
  axis_name=None,
) -> jax.Array:
  """SimCSE (arXiv:2104.08821, equations 4 and 5). Normalises all of them, `[B, d]`.

  Each sentence of `z1` finds its own among those of `z2` and, supervised, among the
  hard negatives of all rows; one direction only, as in the paper.

  Args:
    z1, z2: the same sentences under two dropout masks, or premises and entailments.
    negative: contradictions, one a row.
    negative_weight: added to the logit of a row's own hard negative (equation 8 of the
      appendix: the logarithm of its weight).
    reduction: "mean", "sum" or "none" (`[B]`).
    axis_name: local shards inside a `shard_map` or `pmap`. The mean over the axis is
      the loss, the gradient that of the sum over the axis. The official code gathers
      without a gradient and puts the own rows back: each of its processes has the whole
      loss and, of the gradient, its own rows' part; averaging those, as DDP does,
      leaves 1 / processes of the gradient, a bias that adaptive optimisers hide.
  """
  scale = 1 / temperature
  z1, z2 = l2_normalize(z1), l2_normalize(z2)
  against = softmax.log_sum_exp(z1, z2, scale, aligned=True, axis_name=axis_name)
  if negative is not None:
    negative = l2_normalize(negative)
    positive = _similarity(z1, z2)
    number = softmax.positions(len(z1), axis_name)
    others = softmax.log_sum_exp(
      z1,
      negative,
      scale,
      reference=positive,
      row_ids=number,
      col_ids=number,
      axis_name=axis_name,
    )
    own = scale * (_similarity(z1, negative) - positive) + negative_weight
    against = jnp.logaddexp(against, jnp.logaddexp(others, own))
  return rows.reduce(jax.nn.softplus(against), reduction, axis_name=axis_name)


def dense_retrieval(
  query: jax.Array,
  passage: jax.Array,
  positive: jax.Array | None = None,
  temperature: float = 1.0,
  *,
  ids: jax.Array | None = None,
  reduction: str = "mean",
  axis_name=None,
) -> jax.Array:
  """DPR's in-batch negative log likelihood (arXiv:2004.04906, equation 2).

  Takes the embeddings as given: raw inner products, no temperature in the paper.

  Args:
    query: `[B, d]`. passage: `[M, d]`, the passages of all queries.
    positive: `[B]` int, the row of `passage` that answers a query; by default every
      (M / B)-th, which is DPR's order of a positive followed by its hard negatives.
    ids: `[M]` int; passages with the id of a query's positive are no negatives of it.
    reduction: "mean", "sum" or "none" (`[B]`).
    axis_name: local shards inside a `shard_map` or `pmap`, `positive` counted within
      the shard. The mean over the axis is the loss, the gradient that of the sum.
  """
  if positive is None:
    if len(passage) % len(query):
      raise ValueError(
        f"{len(passage)} passages for {len(query)} queries: say which are positive"
      )
    positive = jnp.arange(len(query)) * (len(passage) // len(query))
  ids = softmax.positions(len(passage), axis_name) if ids is None else ids
  against = softmax.log_sum_exp(
    query,
    passage,
    1 / temperature,
    reference=_similarity(query, jnp.take(passage, positive, axis=0)),
    row_ids=jnp.take(ids, positive),
    col_ids=ids,
    axis_name=axis_name,
  )
  return rows.reduce(jax.nn.softplus(against), reduction, axis_name=axis_name)


def _similarity(x, y):
  return jnp.sum(rows.accurate(x) * rows.accurate(y), axis=1)
