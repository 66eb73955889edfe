"""NT-Xent, InfoNCE, CLIP and SigLIP over the global batch.

Each of the softmax losses is a choice of rows, columns and masks for the primitive of
`clj/losses/softmax.py`; memory is linear in the batch.
"""

import jax
import jax.numpy as jnp

from clj.losses import sigmoid, softmax


def l2_normalize(z):
  """z / |z| over the last axis; rows of norm below 1e-6 get no gradient."""
  norm2 = jnp.sum(jnp.square(z.astype(jnp.float32)), axis=-1, keepdims=True)
  tiny = norm2 <= softmax.EPSILON
  inverse = jnp.where(tiny, 1e6, jax.lax.rsqrt(jnp.where(tiny, 1.0, norm2)))
  z = jnp.where(tiny, jax.lax.stop_gradient(z), z)
  return (z.astype(jnp.float32) * inverse).astype(z.dtype)


def reduce(rows, reduction):
  if reduction not in ("mean", "none"):
    raise ValueError(f"reduction={reduction!r} is unknown; use 'mean' or 'none'")
  return jnp.mean(rows) if reduction == "mean" else rows


def nt_xent(
  z1, z2, temperature, *, ids=None, reduction="mean", axis_name=None, ring=False
):
  """NT-Xent of SimCLR (Chen et al., 2020, Eq. 1). Normalises its embeddings.

  Each of the 2B rows finds its partner among the 2B - 1 other rows of both views.

  z1, z2: `[B, d]`, the views of the same examples; temperature divides the cosines.
  ids: int `[B]`; rows of equal id are no negatives of each other.
  reduction: "mean" over the 2B rows, as in the paper, or "none": `[2B]`, z1's rows
    first. The authors' code sums the two directions: twice this value.
  axis_name: z1 and z2 are local shards inside a `shard_map` or `pmap` over this axis.
    The mean of the result over the axis is the global loss, and its gradient is that of
    the sum, so that `pmean` of the gradients is the gradient of the global loss. (The
    authors' replicas give the same: the number of replicas times the gradient of the
    mean.)
  ring: embeddings travel from device to device instead of being gathered: the same
    result in less memory, for batches whose gathered embeddings do not fit.
  """
  m1, m2 = softmax.log_sum_exp_self(
    z1, z2, 1.0 / temperature, ids=ids, normalize=True, axis_name=axis_name, ring=ring
  )
  rows1, rows2 = jax.nn.softplus(m1), jax.nn.softplus(m2)
  if reduction == "mean":  # apart, so that no rows move between devices
    return (jnp.mean(rows1) + jnp.mean(rows2)) / 2
  return reduce(jnp.concatenate([rows1, rows2]), reduction)


def info_nce(
  query,
  key,
  temperature,
  *,
  negatives=None,
  symmetric=False,
  ids=None,
  negative_ids=None,
  reduction="mean",
  axis_name=None,
  ring=False,
):
  """InfoNCE (van den Oord et al., 2018, Eq. 4) with in-batch negatives. Normalises not.

  query, key: `[B, d]`, pairs; temperature divides the inner products.
  negatives: `[K, d]`, more keys that are nobody's positive: a queue, hard negatives.
  symmetric: the mean of both directions; the keys' does not see `negatives`.
  ids, negative_ids: int `[B]`, `[K]`; keys with the id of the query's own pair are left
    out of its negatives.
  reduction: "mean" over the rows, or "none": `[B]`.
  axis_name, ring: as in `nt_xent`; `negatives` is then the device's own shard of them.
  """
  scale = 1.0 / temperature
  if symmetric:
    m, m_key = softmax.log_sum_exp_pair(
      query, key, scale, ids=ids, axis_name=axis_name, ring=ring
    )
  else:
    m = softmax.log_sum_exp(
      query,
      key,
      scale,
      aligned=True,
      row_ids=ids,
      col_ids=ids,
      axis_name=axis_name,
      ring=ring,
    )
  if negatives is not None:
    positive = jnp.sum(query.astype(jnp.float32) * key.astype(jnp.float32), axis=1)
    more = softmax.log_sum_exp(
      query,
      negatives,
      scale,
      reference=positive,
      row_ids=None if negative_ids is None else ids,
      col_ids=negative_ids,
      axis_name=axis_name,
      ring=ring,
    )
    m = jnp.logaddexp(m, more)
  rows = jax.nn.softplus(m)
  if symmetric:
    rows = (rows + jax.nn.softplus(m_key)) / 2
  return reduce(rows, reduction)


def clip(image, text, scale, *, ids=None, reduction="mean", axis_name=None, ring=False):
  """CLIP's symmetric cross entropy (Radford et al., 2021, Fig. 3). Normalises not.

  image, text: `[B, d]`, pairs, normalised by the caller (`l2_normalize`); scale
    multiplies their inner products (the exponential of the learned logarithm).
  ids: int `[B]`; pairs of equal id are no negatives of each other.
  reduction: "mean" over the pairs, or "none": `[B]`, the mean of its two directions.
  axis_name, ring: as in `nt_xent`. Of open_clip's four distributed forms,
    local_loss=True with gather_with_grad=False is biased (a row's part in the other
    ranks' softmaxes is missing), and local_loss=False with gather_with_grad=False
    scales the towers' gradients, but not the scale's, by 1 / ranks after averaging; the
    other two agree with this one.
  """
  m_image, m_text = softmax.log_sum_exp_pair(
    image, text, scale, ids=ids, axis_name=axis_name, ring=ring
  )
  rows = (jax.nn.softplus(m_image) + jax.nn.softplus(m_text)) / 2
  return reduce(rows, reduction)


def siglip(
  image,
  text,
  scale,
  bias=0.0,
  *,
  ids=None,
  reduction="mean",
  axis_name=None,
  ring=False,
):
  """SigLIP's pairwise sigmoid loss (Zhai et al., 2023, Alg. 1). Normalises not.

  -sum_ij log sigmoid(y_ij (scale <image_i, text_j> + bias)) / B, y_ij = 1 for pairs and
  -1 otherwise.

  image, text: `[B, d]`, pairs, normalised by the caller; scale and bias are scalars.
  ids: int `[B]`; other pairs of equal id are left out.
  reduction: "mean" over the images, or "none": `[B]`, the sum over an image's texts.
  axis_name, ring: as in `nt_xent`. open_clip's four exchange schemes agree with it.
  """
  rows = sigmoid.log_sigmoid_sum(
    image, text, scale, bias, ids=ids, axis_name=axis_name, ring=ring
  )
  return reduce(rows, reduction)
