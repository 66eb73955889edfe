"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations.

Chen, Kornblith, Norouzi, Hinton, 2020, arXiv:2002.05709. Authors' code:
github.com/google-research/simclr.

Two random views of a picture go through an encoder f and a projection head g
(Algorithm 1); the loss (Eq. 1, NT-Xent) asks each projection to find the other view's
among all 2N - 1 of the batch. Afterwards the head is thrown away.

Differences from the authors' code: the loss is the paper's mean over the 2N rows,
theirs is the sum of the two directions, twice that; batch norm is over the whole global
batch of both views, as theirs is on TPU.
"""

import jax

from clj import losses, models
from clj.cli import UserError
from clj.method import Aux, Method, keep


def make(
  model: dict, *, total_steps: int, projector: dict, temperature: float = 0.1
) -> Method:
  """Builds SimCLR.

  model: keyword arguments of `models.image`, the encoder.
  total_steps: of the run; nothing here changes with them.
  projector: keyword arguments of `models.projector`, the projection head.
  temperature: divides the cosine similarities.
  """
  del total_steps
  encoder = models.image(**model)
  head = models.projector(**projector)

  def init(rng, batch):
    rng_encoder, rng_head = jax.random.split(rng)
    if (V := batch["image"].shape[1]) != 2:
      raise UserError(
        f"simclr compares two views of a picture, not {V}: set the number of views to 2"
      )
    params, extra = {}, {}
    image = batch["image"][:, 0]
    params["encoder"], extra["encoder"] = encoder.init(rng_encoder, image)
    h, _ = encoder.apply(params["encoder"], extra["encoder"], image, train=False)
    params["projector"], extra["projector"] = head.init(rng_head, h)
    return params, extra

  def loss(params, extra, batch, rng, step):
    del rng, step
    B, V, *pixels = batch["image"].shape  # V = 2 views lie side by side
    x = batch["image"].reshape(B * V, *pixels)
    h, encoder_stats = encoder.apply(params["encoder"], extra["encoder"], x, train=True)
    z, head_stats = head.apply(params["projector"], extra["projector"], h, train=True)
    z1_Bd, z2_Bd = z.reshape(B, V, -1).swapaxes(0, 1)
    value = losses.nt_xent(z1_Bd, z2_Bd, temperature)
    features = jax.lax.stop_gradient(h.reshape(B, V, -1)[:, 0])
    extra = {"encoder": encoder_stats, "projector": head_stats}
    return value, (extra, Aux({}, features))

  def embed(params, extra, batch):
    if "image" not in batch:
      return {}
    h, _ = encoder.apply(
      params["encoder"], extra["encoder"], batch["image"][:, 0], train=False
    )
    z, _ = head.apply(params["projector"], extra["projector"], h, train=False)
    return {"features": h, "projection": z}

  return Method(init, loss, keep, embed)
