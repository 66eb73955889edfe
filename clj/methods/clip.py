"""CLIP, and what is made of the same two towers: SigLIP, LiT, SLIP.

Radford et al., 2021, arXiv:2103.00020. An image tower and a text tower end in one joint
space; of the B images and B texts of a batch each has to find its partner (Fig. 3),
with a temperature that is learned.

The options and their papers:

- `loss="sigmoid"`: every pair is judged by itself (SigLIP, Zhai et al., 2023,
  arXiv:2303.15343), with a learned bias.
- `locked`: towers, or parts of them, that keep their weights (LiT, Zhai et al., 2021,
  arXiv:2111.07991). No gradient is computed for them.
- `slip`: SimCLR on two more views of the image (SLIP, Mu et al., 2021,
  arXiv:2112.12750).
- `distill`: a larger model's similarities are imitated, as by open_clip.
- `micro_batch`: GradCache (Gao et al., 2021, arXiv:2101.06983), the gradient of the
  whole batch in the memory of a part of it.
- `average`: after fine-tuning, weights between the old and the new ones (WiSE-FT,
  Wortsman et al., 2021, arXiv:2109.01903).

Differences from the papers: pairs with the same caption are no negatives of each other
(`mask_duplicates`; the published recipes switch that off).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from clj import losses, models, optim
from clj.cli import UserError
from clj.method import Aux, Method

MODALITIES = ("image", "text")


def make(
  model: dict,
  *,
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
  slip: dict | None = None,
  distill: dict | None = None,
  average: float | None = None,
) -> Method:
  """Builds CLIP.

  Parameters are named "image/...", "text/..." (the towers), "image_head/...",
  "text_head/...", "log_scale" and "bias" (of the sigmoid loss). A learning rate of its
  own for a tower is a group of the optimiser, `(("^image/", {"multiplier": 0.1}),)`.

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
    locked: a regular expression on names of parameters that stay as they are:
      "^image/" is LiT. A tower that is locked as a whole runs as in evaluation (batch
      statistics frozen, no dropout).
    micro_batch: images and texts that are encoded at a time, over all devices; 0: all.
      It divides the batch. Not for towers with batch norm, which see their whole batch.
    ring: embeddings travel around the devices instead of being gathered.
    slip: "weight", "temperature" and "projector" (arguments of `models.projector`):
      adds NT-Xent between the two views of `batch["crops"]`, `data.augment.crops`.
    distill: "weight", and "model", "width", "image_head", "text_head" of the teacher,
      whose weights are `extra["teacher"]`: `init_from` fills them in, with
      `init_rename=(("^params/(.*)", r"extra/teacher/params/\\1"), ("^extra/(.*)",
      r"extra/teacher/\\1"))`.
    average: share of the trained weights in what `embed` uses; the rest are those of
      the start, `extra["start"]`, which `init_from` fills in by the `init_rename` of
      `configs/clip.py:finetune`. The trained weights alone give "trained_image" and so
      on.
  """
  if loss not in ("softmax", "sigmoid"):
    raise UserError(f"method.loss is {loss!r}: use 'softmax' or 'sigmoid'")
  if average is not None and not 0 <= average <= 1:
    raise UserError(f"method.average is {average}: a share between 0 and 1, or None")
  towers = _towers(model, width, image_head, text_head)
  projector = models.projector(**slip["projector"]) if slip else None
  teacher_weight = distill["weight"] if distill else 0.0
  teacher = (
    _towers(**{k: v for k, v in distill.items() if k != "weight"}) if distill else None
  )

  def init(rng, batch):
    rng_towers, rng_teacher, rng_slip = jax.random.split(rng, 3)
    params, extra = towers.init(rng_towers, batch)
    params["log_scale"] = jnp.full((), math.log(init_scale), jnp.float32)
    if loss == "sigmoid":
      params["bias"] = jnp.full((), init_bias, jnp.float32)
    for name in MODALITIES if micro_batch else ():
      if jax.tree.leaves(extra[name]) and not is_locked(params, name):
        raise UserError(
          f"method.micro_batch is {micro_batch}, but the {name} tower has batch norm, "
          "whose statistics are those of the whole batch: use 0, or another tower"
        )
    if average is not None:
      extra["start"] = jax.tree.map(jnp.copy, params)
    if distill:
      weights, stats = teacher.init(rng_teacher, batch)
      weights["log_scale"] = jnp.full((), math.log(100.0), jnp.float32)
      extra["teacher"] = {"params": weights, **stats}
    if slip:
      if "crops" not in batch or batch["crops"].shape[1] != 2:
        raise UserError("method.slip needs two views: set data.augment.crops.views=2")
      image = (batch["image"][:, 0],)
      h, _, _ = jax.eval_shape(
        lambda p, s: towers.apply(p, s, "image", image, train=False), params, extra
      )
      h = jnp.zeros(h.shape, h.dtype)
      params["projector"], extra["projector"] = projector.init(rng_slip, h)
    return params, extra

  def is_locked(params, name):
    """Whether all of a tower is."""
    names = jax.tree.leaves(optim.names({name: params[name]}))
    return all(optim.matches(locked, n) for n in names)

  def encode(params, extra, name, inputs, rng):
    """A tower in training: features and normalised embeddings of the whole batch."""
    train = not is_locked(params, name)

    def run(inputs, rng):
      h, z, stats = towers.apply(params, extra, name, inputs, train=train, rng=rng)
      return (h, losses.l2_normalize(z)), stats

    if not micro_batch:
      (h, z), stats = run(inputs, rng)
      return h, z, stats
    (h, z), _ = losses.encode_in_chunks(run, inputs, micro_batch, rng=rng, has_aux=True)
    return h, z, extra[name]

  def loss_fn(params, extra, batch, rng, step):
    del step
    params = _stop_locked(locked, params)
    rng_image, rng_text, rng_slip = (jax.random.fold_in(rng, i) for i in (1, 2, 3))
    image, text = batch["image"][:, 0], (batch["text"], batch["text_mask"])
    h, x, image_stats = encode(params, extra, "image", (image,), rng_image)
    _, y, text_stats = encode(params, extra, "text", text, rng_text)
    stats = {"image": image_stats, "text": text_stats}
    scale = jnp.exp(params["log_scale"])
    ids = caption_ids(*text) if mask_duplicates else None
    metrics = {"scale": scale, "similarity": jnp.mean(jnp.sum(x * y, axis=1))}
    if loss == "softmax":
      value = losses.clip(x, y, scale, ids=ids, ring=ring)
    else:
      metrics["bias"] = params["bias"]
      value = losses.siglip(x, y, scale, params["bias"], ids=ids, ring=ring)
    metrics["contrastive"] = value
    if distill:
      taught = _embed_as_teacher(teacher, extra["teacher"], image, text, micro_batch)
      teacher_scale = jnp.exp(extra["teacher"]["params"]["log_scale"])
      metrics["distill"] = losses.clip_distill(x, y, *taught, scale, teacher_scale)
      value += teacher_weight * metrics["distill"]
    if slip:
      crops = batch["crops"]
      views = crops.reshape(-1, *crops.shape[2:])
      seen, _, stats["image"] = encode(
        params, extra | stats, "image", (views,), rng_slip
      )
      z, stats["projector"] = projector.apply(
        params["projector"], extra["projector"], seen, train=True
      )
      z1, z2 = z.reshape(len(crops), 2, -1).swapaxes(0, 1)
      metrics["slip"] = losses.nt_xent(z1, z2, slip["temperature"])
      value += slip["weight"] * metrics["slip"]
    return value, (extra | stats, Aux(metrics, jax.lax.stop_gradient(h)))

  def post(params, extra, step):
    del step
    if max_scale is not None:
      limits = 0.0, math.log(max_scale)
      params = {**params, "log_scale": jnp.clip(params["log_scale"], *limits)}
    return params, extra

  def embed(params, extra, batch):
    def all_of(params, prefix=""):
      found = {}
      for name in MODALITIES:
        if name in batch:
          inputs = (batch["image"][:, 0],) if name == "image" else text_of(batch)
          h, z, _ = towers.apply(params, extra, name, inputs, train=False)
          found[prefix + name] = z
          if name == "image":
            found[f"{prefix}features"] = h
      return found

    if average is None:
      return all_of(params)
    mix = lambda old, new: (1 - average) * old + average * new
    averaged = jax.tree.map(mix, extra["start"], params)
    return all_of(averaged) | all_of(params, "trained_")

  text_of = lambda batch: (batch["text"], batch["text_mask"])
  return Method(init, loss_fn, post, embed, ("image", "text", "text_mask"), locked)


class _Towers(NamedTuple):
  init: Callable  # (rng, batch) -> (params, stats), by modality
  apply: Callable  # (params, stats, name, inputs, train, rng) -> (features, z, stats)


def _towers(model, width, image_head="linear", text_head="linear") -> _Towers:
  """Two towers with their heads; `model` and the rest as in `make`."""
  networks = {
    "image": models.image(**model["image"]),
    "text": models.text(**model["text"]),
  }
  heads = {"image": image_head, "text": text_head}
  for name, head in heads.items():
    if head not in ("linear", "affine", "none"):
      raise UserError(
        f"method.{name}_head is {head!r}: use 'linear', 'affine' or 'none'"
      )

  def init(rng, batch):
    inputs = {
      "image": (batch["image"][:, 0],),
      "text": (batch["text"], batch["text_mask"]),
    }
    params, stats = {}, {}
    for i, (name, network) in enumerate(networks.items()):
      rng_tower, rng_head = jax.random.split(jax.random.fold_in(rng, i))
      params[name], stats[name] = network.init(rng_tower, *inputs[name])
      apply = functools.partial(network.apply, train=False)
      h, _ = jax.eval_shape(apply, params[name], stats[name], *inputs[name])
      features = h.shape[-1]
      if heads[name] == "none":
        if features != width:
          raise UserError(
            f"the {name} tower's features are {features} wide and method.width is "
            f"{width}; without a head they must be equal: set method.{name}_head"
          )
        continue
      kernel = jax.random.normal(rng_head, (features, width)) / math.sqrt(features)
      params[f"{name}_head"] = {"kernel": kernel}
      if heads[name] == "affine":
        params[f"{name}_head"]["bias"] = jnp.zeros((width,))
    return params, stats

  def apply(params, stats, name, inputs, *, train, rng=None):
    h, updated = networks[name].apply(
      params[name], stats[name], *inputs, train=train, rng=rng if train else None
    )
    z, head = h, params.get(f"{name}_head", {})
    if "kernel" in head:
      z = z @ head["kernel"]
    if "bias" in head:
      z = z + head["bias"][None]
    return h, z, updated

  return _Towers(init, apply)


def _embed_as_teacher(teacher, extra, image, text, micro_batch):
  def run(inputs, name):
    _, z, _ = teacher.apply(extra["params"], extra, name, inputs, train=False)
    return jax.lax.stop_gradient(losses.l2_normalize(z))

  def encode(name, inputs):
    if not micro_batch:
      return run(inputs, name)
    return losses.encode_in_chunks(lambda x: run(x, name), inputs, micro_batch)

  return encode("image", (image,)), encode("text", text)


def _stop_locked(locked, params):
  """The same parameters; of those that are locked no gradient is computed."""
  return jax.tree.map(
    lambda name, p: jax.lax.stop_gradient(p) if optim.matches(locked, name) else p,
    optim.names(params),
    params,
  )


def caption_ids(text, mask):
  """A 32-bit hash of the real tokens of every row: `[B, L]`, `[B, L]` -> int32 `[B]`.

  Equal captions have equal ids. Of two different ones that is expected once in four
  billion pairs, and all it does is to spare a negative.
  """
  place = jnp.arange(text.shape[1], dtype=jnp.uint32)[None] * jnp.uint32(0x9E3779B9)
  x = jnp.where(mask, text + 1, 0).astype(jnp.uint32)
  x = _mix(x * jnp.uint32(0x85EBCA6B) ^ _mix(place))
  x = _mix(jnp.sum(jnp.where(mask, x, 0), axis=1, dtype=jnp.uint32))
  return jax.lax.bitcast_convert_type(x, jnp.int32)


def _mix(x):
  """The finaliser of MurmurHash3: a bijection of 32 bits, every one to all."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
