"""Recommendation: BPR, SGL's contrast of nodes, sampled softmax of two towers."""

import jax
import jax.numpy as jnp
from jax import lax

from clj.losses import rows, softmax
from clj.losses.contrastive import l2_normalize

TILE = 256  # columns of logits that the search for hard negatives holds at a time


def bpr(
  user: jax.Array, positive: jax.Array, negative: jax.Array, *, reduction: str = "mean"
) -> jax.Array:
  """Bayesian personalised ranking (arXiv:1205.2618, section 4). Normalises nothing.

  softplus(<user, negative> - <user, positive>), rows `[B, d]`. reduction: "mean", as in
  LightGCN, "sum", as in the paper and SGL, or "none" (`[B]`). The paper's regulariser
  is `l2_penalty`.
  """
  user = rows.accurate(user)
  difference = rows.accurate(negative) - rows.accurate(positive)
  return rows.reduce(jax.nn.softplus(jnp.sum(user * difference, axis=1)), reduction)


def l2_penalty(*embeddings: jax.Array) -> jax.Array:
  """Half the sum of the squares of all entries, to go with `bpr`.

  LightGCN divides it by the batch size, SGL does not; both take the embeddings before
  propagation, of the users and items of the batch, with repetitions.
  """
  return sum(jnp.sum(jnp.square(rows.accurate(x))) for x in embeddings) / 2


def sgl(
  view1: jax.Array,
  view2: jax.Array,
  index: jax.Array,
  temperature: float = 0.2,
  *,
  reduction: str = "sum",
  axis_name=None,
) -> jax.Array:
  """SGL's contrast against all nodes (arXiv:2010.10783, equation 10). Normalises.

  Each node of the batch finds itself in the other view among all nodes. The paper sums
  over the batch, adds the users' and the items' side and multiplies by its lambda_1.
  The official code's other two modes are choices of nodes: with `view1[index]` and
  `view2[index]` for the views the batch alone is contrasted, and with the distinct
  users and items of the batch concatenated they are merged into one softmax.

  Args:
    view1, view2: `[N, d]`, all nodes of one side in two views of the graph.
    index: `[B]` int, the nodes of the batch; repetitions count repeatedly.
    reduction: "sum", "mean" or "none" (`[B]`).
    axis_name: local shards of the nodes and of the batch inside a `shard_map` or
      `pmap`; `index` counts the nodes of all shards. The mean over the axis is the
      loss, the gradient that of the sum over the axis.
  """
  # Of all nodes, wherever they are, those of the batch.
  batch = lambda view: jnp.take(rows.gather(view, axis_name), index, axis=0)
  query, key = l2_normalize(batch(view1)), l2_normalize(view2)
  positive = jnp.sum(rows.accurate(query) * rows.accurate(batch(key)), axis=1)
  against = softmax.log_sum_exp(
    query,
    key,
    1 / temperature,
    reference=positive,
    row_ids=index.astype(jnp.int32),
    col_ids=softmax.positions(len(key), axis_name),
    axis_name=axis_name,
  )
  return rows.reduce(jax.nn.softplus(against), reduction, axis_name=axis_name)


def sampled_softmax(
  query: jax.Array,
  item: jax.Array,
  temperature: float = 1.0,
  *,
  probability: jax.Array | None = None,
  correct_positive: bool = True,
  ids: jax.Array | None = None,
  negatives: jax.Array | None = None,
  negative_probability: jax.Array | None = None,
  negative_ids: jax.Array | None = None,
  hard_negatives: int | None = None,
  weights: jax.Array | None = None,
  reduction: str = "mean",
  axis_name=None,
) -> jax.Array:
  """In-batch softmax of two towers with logQ correction. Normalises nothing.

  Yi et al., RecSys 2019 (doi:10.1145/3298689.3346996), equations 4 and 5: the logits
  <query, item> / temperature less log q of their column, after the temperature, with q
  clipped to [1e-6, 1]. TensorFlow Recommenders agrees with reduction="sum".

  Args:
    query, item: `[B, d]`, pairs.
    probability: `[B]`, q: how likely each item was to be sampled into a batch.
    correct_positive: False leaves the positive's own logit uncorrected, for it is not
      sampled (arXiv:2507.09331); the published loss and TensorFlow Recommenders
      correct it too.
    ids: `[B]` int of the items: other columns with the id of the row's item, accidental
      hits, are removed.
    negatives, negative_probability, negative_ids: `[K, d]`, `[K]`, `[K]`: more items
      that are nobody's positive.
    hard_negatives: keep only this many negatives a row, those of the largest corrected
      logits.
    weights: `[B]`, of the rows; the mean is the weighted sum by the sum of the weights.
    reduction: "mean", "sum" or "none" (`[B]`).
    axis_name: local shards inside a `shard_map` or `pmap`. The mean over the axis is
      the loss, the gradient that of the sum over the axis.
  """
  if (negatives is not None) and (
    (probability is None) != (negative_probability is None)
    or (ids is None) != (negative_ids is None)
  ):
    raise ValueError("negatives come with a probability and ids exactly if items do")
  scale = 1 / temperature
  log_q = lambda q: jnp.log(jnp.clip(rows.accurate(q), 1e-6, 1.0))
  bias = None if probability is None else -log_q(probability)
  positive = jnp.sum(rows.accurate(query) * rows.accurate(item), axis=1)
  own = softmax.positions(len(query), axis_name) if ids is None else ids
  columns = [(item, bias, own)]
  if negatives is not None:
    more = None if negative_probability is None else -log_q(negative_probability)
    # Without ids no negative is anybody's own item.
    none = jnp.full(len(negatives), -1, own.dtype)
    columns.append((negatives, more, none if ids is None else negative_ids))

  if hard_negatives is None:
    against = -jnp.inf
    for key, bias_of_key, key_ids in columns:
      against = jnp.logaddexp(
        against,
        softmax.log_sum_exp(
          query,
          key,
          scale,
          reference=positive,
          bias=bias_of_key,
          row_ids=own,
          col_ids=key_ids,
          axis_name=axis_name,
        ),
      )
  else:
    against = _hardest(query, positive, own, columns, scale, hard_negatives, axis_name)
  if probability is not None and correct_positive:
    against = against - bias
  return rows.reduce(jax.nn.softplus(against), reduction, weights, axis_name)


def _hardest(query, positive, own, columns, scale, many, axis_name):
  """`log_sum_exp` over only the `many` columns of the largest logits in each row."""
  keys = jnp.concatenate([rows.gather(key, axis_name) for key, _, _ in columns])
  ids = jnp.concatenate([rows.gather(number, axis_name) for _, _, number in columns])
  biases = [jnp.zeros(len(k)) if bias is None else bias for k, bias, _ in columns]
  bias = jnp.concatenate([rows.gather(b, axis_name) for b in biases])
  many = min(many, len(keys) - 1)

  def choose(query, own):
    tile = min(TILE, len(keys))
    extra = -len(keys) % tile

    def step(best, one):
      key, bias, ids, column = one
      logits = scale * rows.dot(query, key.T) + bias[None]
      kept = (ids[None] != own[:, None]) & (column[None] < len(keys))
      logits = jnp.where(kept, logits, -jnp.inf)
      column = jnp.broadcast_to(column[None], logits.shape)
      logits = jnp.concatenate([best[0], logits], axis=1)
      column = jnp.concatenate([best[1], column], axis=1)
      top, place = lax.top_k(logits, many)
      return (top, jnp.take_along_axis(column, place, axis=1)), None

    split = lambda x: x.reshape(-1, tile, *x.shape[1:])
    pad = lambda x: jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1))
    numbers = jnp.arange(len(keys) + extra)
    tiles = (*(split(pad(x)) for x in (keys, bias, ids)), split(numbers))
    first = jnp.broadcast_to(jnp.zeros_like(own)[:, None], (len(query), many))
    best = (first.astype(bias.dtype) - jnp.inf, first.astype(numbers.dtype))
    return lax.scan(step, best, tiles)[0][1]

  chosen = choose(*lax.stop_gradient((query, own)))
  key = rows.accurate(keys)[chosen]
  similarity = jnp.einsum("bd,bkd->bk", rows.accurate(query), key, precision="highest")
  logits = scale * (similarity - positive[:, None]) + bias[chosen]
  kept = ids[chosen] != own[:, None]
  logits = jnp.where(kept, logits, -jnp.inf)
  return jnp.where(kept.any(1), jax.nn.logsumexp(logits, axis=1), -jnp.inf)
