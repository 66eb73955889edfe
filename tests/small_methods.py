"""Methods of a few lines that exist only here: signals, and crops of two sizes."""

import jax
import jax.numpy as jnp

from clj import losses
from clj.method import Aux, Method, keep


def make_signals(model, *, total_steps, width=8, noise=0.1, temperature=0.2):
  """Two noisy halves of a signal `[L, C]` find each other; there is no picture.

  model: "channels", C. The embedding is that of the mean and the spread over time.
  """
  del total_steps

  def init(rng, batch):
    del batch
    kernel = jax.random.normal(rng, (2 * model["channels"], width))
    return {"kernel": 0.3 * kernel}, {}

  def encode(params, signal, mask):
    """`[B, L, C]`, `[B, L]` -> `[B, width]`."""
    weight = mask[..., None].astype(jnp.float32)
    count = jnp.maximum(weight.sum(1), 1)
    mean = (weight * signal).sum(1) / count
    spread = (weight * jnp.abs(signal - mean[:, None])).sum(1) / count
    return jnp.concatenate([mean, spread], axis=1) @ params["kernel"]

  def loss(params, extra, batch, rng, step):
    del step
    signal, mask = batch["signal"], batch["signal_mask"]
    first = jnp.arange(mask.shape[1])[None] < mask.sum(1, keepdims=True) // 2
    shake = noise * jax.random.normal(rng, signal.shape)
    h = encode(params, signal + shake, mask & first)
    other = encode(params, signal - shake, mask & ~first)
    value = losses.info_nce(
      losses.l2_normalize(h), losses.l2_normalize(other), temperature
    )
    return value, (extra, Aux({}, jax.lax.stop_gradient(h)))

  def embed(params, extra, batch):
    del extra
    if "signal" not in batch:
      return {}
    return {"signal": encode(params, batch["signal"], batch["signal_mask"])}

  return Method(init, loss, keep, embed, ("signal", "signal_mask"))


def make_multi_crop(model, *, total_steps, width=8, temperature=0.2):
  """Large and small crops of a picture find each other, as in SwAV's multi-crop.

  batch: "image" `[B, 2, S, S, 3]` and "crops" `[B, V, s, s, 3]`. The embedding is
  linear in the mean colours of a grid of `model["grid"]`^2 cells.
  """
  del total_steps
  grid = model["grid"]

  def init(rng, batch):
    del batch
    return {"kernel": jax.random.normal(rng, (grid * grid * 3, width))}, {}

  def encode(params, image):
    *lead, side, _, _ = image.shape
    cells = image.reshape(*lead, grid, side // grid, grid, side // grid, 3)
    return cells.mean((-4, -2)).reshape(*lead, -1) @ params["kernel"]

  def loss(params, extra, batch, rng, step):
    del rng, step
    large, small = (encode(params, batch[key]) for key in ("image", "crops"))
    target = losses.l2_normalize(large.mean(1))
    pairs = [losses.l2_normalize(small[:, v]) for v in range(small.shape[1])]
    value = sum(losses.info_nce(z, target, temperature) for z in pairs) / len(pairs)
    return value, (extra, Aux({}, jax.lax.stop_gradient(large[:, 0])))

  def embed(params, extra, batch):
    del extra
    if "image" not in batch:
      return {}
    return {"features": encode(params, batch["image"][:, 0])}

  return Method(init, loss, keep, embed, ("image", "crops"))


def make_slip_in_code(model, *, total_steps, where="loss"):
  """`make_signals` with a slip: shapes that do not broadcast, a name that is not there.

  where: in "loss" or in "embed".
  """
  method = make_signals(model, total_steps=total_steps)

  def loss(params, extra, batch, rng, step):
    value, rest = method.loss(params, extra, batch, rng, step)
    return value + (jnp.ones(3) * jnp.ones(4)).sum(), rest

  def embed(params, extra, batch):
    return method.embed(params, extra, batch) | {"more": params["kernell"]}

  slips = {"loss": loss, "embed": embed}
  return method._replace(**{where: slips[where]})
