"""SLIP: Self-supervision meets Language-Image Pre-training.

Mu, Kirillov, Wagner, Xie, 2021, arXiv:2112.12750. Authors' code:
github.com/facebookresearch/SLIP.

CLIP on a picture and its caption, plus SimCLR on two further views of the picture
(Algorithm 1): the image tower encodes all three, and a head of its own leads from its
features to where the two views have to find each other. The losses are added.

Differences from the authors' code: both views go through the head as one batch, whose
statistics its batch norms take (theirs: each view by itself); pairs with the same
caption are no negatives of each other (`mask_duplicates=False` is theirs).
"""

import jax
import jax.numpy as jnp

from clj import losses, models
from clj.cli import UserError
from clj.method import Method
from clj.methods import clip, towers


def make(
  model: dict,
  *,
  total_steps: int,
  width: int,
  projector: dict,
  weight: float = 1.0,
  temperature: float = 0.1,
  image_head: str = "linear",
  text_head: str = "linear",
  init_scale: float = 1 / 0.07,
  max_scale: float | None = 100.0,
  mask_duplicates: bool = True,
  locked: str = "",
  micro_batch: int = 0,
) -> Method:
  """Builds SLIP.

  The two views are `batch["crops"]`, `[B, 2, H, W, 3]`. Parameters are those of
  `clip.make` and "projector/...".

  projector: keyword arguments of `models.projector`, the head of the two views.
  weight: of the loss of the two views.
  temperature: of that loss, divides the cosine similarities.
  The rest is as in `clip.make`.
  """
  pairs = clip.make(
    model,
    total_steps=total_steps,
    width=width,
    image_head=image_head,
    text_head=text_head,
    init_scale=init_scale,
    max_scale=max_scale,
    mask_duplicates=mask_duplicates,
    locked=locked,
    micro_batch=micro_batch,
  )
  two = clip.two_towers(model, width, image_head, text_head, locked, micro_batch)
  head = models.projector(**projector)

  def init(rng, batch):
    if batch["crops"].shape[1] != 2:
      raise UserError(
        f"slip compares two views, and `crops` has {batch['crops'].shape[1]}: set the "
        "number of views of data.augment.crops to 2"
      )
    params, extra = pairs.init(rng, batch)
    image = (batch["image"][:, 0],)
    h, _ = jax.eval_shape(lambda p, s: two.embed(p, s, "image", image), params, extra)
    h = jnp.zeros(h.shape, h.dtype)
    params["projector"], extra["projector"] = head.init(jax.random.fold_in(rng, 1), h)
    return params, extra

  def loss(params, extra, batch, rng, step):
    value, (extra, aux) = pairs.loss(params, extra, batch, rng, step)
    params = towers.stop_locked(locked, params)
    B, V, *pixels = batch["crops"].shape
    views = batch["crops"].reshape(B * V, *pixels)  # V = 2 lie side by side
    rng_views = jax.random.fold_in(rng, 2)  # 0 and 1 are taken by the pairs
    h, _, image_stats = two.encode(params, extra, "image", (views,), rng_views)
    z, head_stats = head.apply(params["projector"], extra["projector"], h, train=True)
    z1_Bd, z2_Bd = z.reshape(B, V, -1).swapaxes(0, 1)
    slip = losses.nt_xent(z1_Bd, z2_Bd, temperature)
    extra = extra | {"image": image_stats, "projector": head_stats}
    aux = aux._replace(metrics=aux.metrics | {"slip": slip})
    return value + weight * slip, (extra, aux)

  needs = (*pairs.needs, "crops")
  return pairs._replace(init=init, loss=loss, needs=needs, locked=locked)
