"""CLIP: Learning Transferable Visual Models From Natural Language Supervision.

Radford et al., 2021, arXiv:2103.00020. An image tower and a text tower end in one joint
space; of the B images and B texts of a batch each has to find its partner (Fig. 3),
with a temperature that is learned.

The options and their papers:

- `loss="sigmoid"`: every pair is judged by itself (SigLIP, Zhai et al., 2023,
  arXiv:2303.15343), with a learned bias.
- `locked`: towers, or parts of them, that keep their weights (LiT, Zhai et al., 2021,
  arXiv:2111.07991). No gradient is computed for them.
- `micro_batch`: GradCache (Gao et al., 2021, arXiv:2101.06983), the gradient of the
  whole batch in the memory of a part of it.

Differences from the papers: pairs with the same caption are no negatives of each other
(`mask_duplicates`; the published recipes switch that off).
"""

import math

import chex
import jax
import jax.numpy as jnp

from clj import losses, models
from clj.cli import UserError
from clj.method import Aux, Method
from clj.methods import towers
from clj.methods.ids import text_ids

# What each tower takes of a batch.
KEYS = {"image": ("image",), "text": ("text", "text_mask")}


def make(
  model: dict,
  *,
  total_steps: int,
  width: int,
  image_head: str = "linear",
  text_head: str = "linear",
  loss: str = "softmax",
  init_scale: float = 1 / 0.07,
  max_scale: float | None = 100.0,
  init_bias: float = -10.0,
  mask_duplicates: bool = True,
  locked: str = "",
  micro_batch: int = 0,
  ring: bool = False,
) -> Method:
  """Builds CLIP.

  Parameters are "image/...", "text/..." (the towers), "image_head/...", "log_scale" and
  so on; a tower's own learning rate is a group, `(("^image/", {"multiplier": 0.1}),)`.

  Args:
    model: "image" and "text": keyword arguments of `models.image` and `models.text`.
    width: of the joint space.
    image_head, text_head: what leads from a tower's features to the joint space:
      "linear" (CLIP), "affine" (with a bias: SigLIP's texts) or "none" (the features
      are there already: SigLIP's images, CLIP's ResNets).
    loss: "softmax" or "sigmoid".
    init_scale: what multiplies the cosines at first: 1 / 0.07 for CLIP, 10 for SigLIP.
    max_scale: its upper limit (the lower one is 1), kept after every update; None: no
      limits (SigLIP).
    init_bias: of the sigmoid loss.
    mask_duplicates: pairs of equal tokens are not negatives of each other.
    locked: a regular expression on names of parameters that stay as they are, "^image/"
      for LiT; see `towers.make`.
    micro_batch: images and texts that are encoded at a time, over all devices; 0: all.
      It divides the batch. Not for towers with batch norm, which see their whole batch.
    ring: embeddings travel around the devices instead of being gathered.
  """
  del total_steps
  if loss not in ("softmax", "sigmoid"):
    raise UserError(f"method.loss is {loss!r}: use 'softmax' or 'sigmoid'")
  two = two_towers(model, width, image_head, text_head, locked, micro_batch)

  def init(rng, batch):
    given = {name: towers.inputs(batch, keys) for name, keys in KEYS.items()}
    # The keys from 1 on are for what other methods add.
    params, extra = two.init(jax.random.fold_in(rng, 0), given)
    params["log_scale"] = jnp.full((), math.log(init_scale), jnp.float32)
    if loss == "sigmoid":
      params["bias"] = jnp.full((), init_bias, jnp.float32)
    return params, extra

  def loss_fn(params, extra, batch, rng, step):
    del step
    params = towers.stop_locked(locked, params)
    h, x, y, stats = encode_pairs(two, params, extra, batch, rng)
    ids = text_ids(batch["text"], batch["text_mask"]) if mask_duplicates else None
    value, metrics = contrast(params, x, y, ids, loss=loss, ring=ring)
    return value, (extra | stats, Aux(metrics, jax.lax.stop_gradient(h)))

  def post(params, extra, step):
    del step
    if max_scale is not None:
      limits = 0.0, math.log(max_scale)
      params = {**params, "log_scale": jnp.clip(params["log_scale"], *limits)}
    return params, extra

  def embed(params, extra, batch):
    found = {}
    for name, keys in KEYS.items():
      if all(key in batch for key in keys):
        h, found[name] = two.embed(params, extra, name, towers.inputs(batch, keys))
        if name == "image":
          found["features"] = h
    return found

  needs = sum(KEYS.values(), ())
  return Method(init, loss_fn, post, embed, needs, locked, limits)


def limits(params):
  """The vocabulary of the text tower."""
  return {"text": params["text"]["token"].shape[0]}


def two_towers(
  model, width, image_head="linear", text_head="linear", locked="", micro_batch=0
):
  """An image tower and a text tower; the arguments are those of `make`."""
  networks = {
    "image": models.image(**model["image"]),
    "text": models.text(**model["text"]),
  }
  heads = {"image": image_head, "text": text_head}
  return towers.make(networks, width, heads, locked=locked, micro_batch=micro_batch)


def encode_pairs(two, params, extra, batch, rng):
  """In training: image features `[B, d]`, both embeddings `[B, width]`, statistics.

  Takes the keys 0 and 1 of `rng`.
  """
  found, stats = {}, {}
  for i, (name, keys) in enumerate(KEYS.items()):
    given, key = towers.inputs(batch, keys), jax.random.fold_in(rng, i)
    *found[name], stats[name] = two.encode(params, extra, name, given, key)
  (h, x), (_, y) = found["image"], found["text"]
  chex.assert_equal_shape([x, y])
  return h, x, y, stats


def contrast(params, x, y, ids, *, loss="softmax", ring=False):
  """The loss of image and text embeddings `[B, width]`, and what is reported of it."""
  scale = jnp.exp(params["log_scale"])
  metrics = {"scale": scale, "similarity": jnp.mean(jnp.sum(x * y, axis=1))}
  if loss == "softmax":
    value = losses.clip(x, y, scale, ids=ids, ring=ring)
  else:
    metrics["bias"] = params["bias"]
    value = losses.siglip(x, y, scale, params["bias"], ids=ids, ring=ring)
  return value, metrics | {"contrastive": value}
