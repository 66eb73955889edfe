"""Three modalities, or a teacher of two: AudioCLIP, CLIP distillation."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from clj.losses import rows, softmax
from clj.losses.contrastive import clip, l2_normalize

LARGEST = math.log(100)  # of the learned scales
TILE = 256  # columns of the teacher's similarities held at a time


def audioclip(
  audio: jax.Array | None,
  image: jax.Array | None,
  text: jax.Array | None,
  log_scale_audio_image=LARGEST,
  log_scale_audio_text=LARGEST,
  log_scale_image_text=LARGEST,
  *,
  reduction: str = "mean",
  axis_name=None,
) -> jax.Array:
  """AudioCLIP (arXiv:2106.13043, section 3). Normalises its embeddings, `[B, d]`.

  The symmetric cross-entropies of the pairs of those modalities that are given (None
  leaves one out), each the sum of its two directions, twice `clip`; added up and
  divided, as in the official code, by the factorial of the number of pairs: 6 for all
  three, 1 for one. exp(log_scale) is clipped to [1, 100]; the defaults are its end.

  reduction: "mean" or "none" (`[B]`). axis_name: as in `clip`.
  """
  pairs = [
    (audio, image, log_scale_audio_image),
    (audio, text, log_scale_audio_text),
    (image, text, log_scale_image_text),
  ]
  pairs = [pair for pair in pairs if pair[0] is not None and pair[1] is not None]
  if not pairs:
    raise ValueError("AudioCLIP needs two of audio, image and text, got fewer")
  total = 0.0
  for a, b, log_scale in pairs:
    scale = jnp.clip(jnp.exp(log_scale), 1.0, 100.0)
    a, b = l2_normalize(a), l2_normalize(b)
    total += 2 * clip(a, b, scale, reduction=reduction, axis_name=axis_name)
  return total / math.factorial(len(pairs))


def clip_distill(
  image: jax.Array,
  text: jax.Array,
  teacher_image: jax.Array,
  teacher_text: jax.Array,
  scale,
  teacher_scale,
  *,
  reduction: str = "mean",
  axis_name=None,
) -> jax.Array:
  """CLIP's similarities distilled, as open_clip's DistillClipLoss. Normalises nothing.

  The cross-entropy (not the divergence) between the teacher's softmax over the batch
  and the student's, the mean of both directions. open_clip adds `clip` to it.

  Args:
    image, text: `[B, d]`. teacher_image, teacher_text: `[B, d']`, stopped. All are
      normalised by the caller.
    scale, teacher_scale: multiply the inner products; the teacher's is stopped.
    reduction: "mean", "sum" or "none" (`[B]`, the mean of a pair's two directions).
    axis_name: local shards inside a `shard_map` or `pmap`. The mean over the axis is
      the loss, the gradient that of the sum over the axis.
  """
  teacher_image, teacher_text = lax.stop_gradient((teacher_image, teacher_text))
  teacher_scale = lax.stop_gradient(teacher_scale)

  def one_direction(x, y, teacher_x, teacher_y):
    expected = _expected(teacher_x, teacher_y, teacher_scale, y, axis_name)
    # Relative to the similarity that the teacher expects, the log-sum-exp is the loss.
    similarity = jnp.sum(rows.accurate(x) * expected, axis=1)
    return softmax.log_sum_exp(x, y, scale, reference=similarity, axis_name=axis_name)

  values = one_direction(image, text, teacher_image, teacher_text)
  values += one_direction(text, image, teacher_text, teacher_image)
  return rows.reduce(values / 2, reduction, axis_name=axis_name)


def _expected(x, y, scale, values, axis_name):
  """`[B, d]`: the mean of `values` under each row's softmax over scale * x y'."""
  lse = softmax.log_sum_exp(x, y, scale, axis_name=axis_name)

  def by_row(x_bd, lse_b, y_bd, values_bd, scale_b, axis_name):
    y_Bd = rows.gather(y_bd, axis_name)
    values_Bd = rows.gather(rows.accurate(values_bd), axis_name)
    tile = min(TILE, len(y_Bd))
    extra = -len(y_Bd) % tile

    def tiles(a):
      return jnp.pad(a, ((0, extra), (0, 0))).reshape(-1, tile, a.shape[1])

    @jax.checkpoint
    def add(total, one):
      y, values, column = one
      logits = scale_b[:, None] * rows.dot(x_bd, y.T) - lse_b[:, None]
      p = jnp.where(column[None] < len(y_Bd), jnp.exp(logits), 0)
      return total + rows.dot(p, values), None

    column = jnp.arange(len(y_Bd) + extra).reshape(-1, tile)
    zero = jnp.zeros((len(x_bd), values_Bd.shape[1]), values_Bd.dtype)
    zero = zero if axis_name is None else softmax.vary(zero, axis_name)
    return lax.scan(add, zero, (tiles(y_Bd), tiles(values_Bd), column))[0]

  scale = jnp.broadcast_to(jnp.asarray(scale, lse.dtype), lse.shape)
  return rows.each(by_row, x, lse, y, values, scale, axis_name=axis_name)
