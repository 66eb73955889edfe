"""CLIP that imitates the similarities of a larger CLIP, as open_clip distils.

github.com/mlfoundations/open_clip, `DistillClipLoss`: to CLIP's loss on the student's
embeddings is added the cross-entropy between the teacher's softmax over the batch and
the student's, of images over texts and of texts over images. Student and teacher may
differ in everything, the joint space included; nothing else of the teacher is imitated.

The teacher's weights are `extra["teacher"]`: they are never trained, and `init_from`
fills them in, from a run of `clip` with

    init_rename=(("^params/(.*)", r"extra/teacher/params/\1"),
                 ("^extra/(.*)", r"extra/teacher/\1"))

and from a safetensors file with `(("^(.*)", r"extra/teacher/params/\1"),)`.

Differences from the code: pairs with the same caption are no negatives of each other in
CLIP's loss (`mask_duplicates=False` is theirs); the distillation can be weighted.
"""

import math

import jax
import jax.numpy as jnp

from clj import losses
from clj.cli import check_keywords
from clj.method import Aux, Method
from clj.methods import clip, towers
from clj.methods.ids import text_ids


def make(
  model: dict,
  *,
  total_steps: int,
  width: int,
  teacher: dict,
  weight: float = 1.0,
  image_head: str = "linear",
  text_head: str = "linear",
  init_scale: float = 1 / 0.07,
  max_scale: float | None = 100.0,
  mask_duplicates: bool = True,
  locked: str = "",
  micro_batch: int = 0,
) -> Method:
  """Builds CLIP with a teacher.

  teacher: "model" and "width", and where they are not "linear" "image_head" and
    "text_head", as those of the run that trained it.
  weight: of the distillation.
  The rest, of the student, is as in `clip.make`.
  """
  check_keywords(clip.two_towers, teacher, "method.teacher")
  student = clip.make(
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
  small = clip.two_towers(model, width, image_head, text_head, locked, micro_batch)
  large = clip.two_towers(**teacher, locked=".", micro_batch=micro_batch)  # all of it

  def init(rng, batch):
    params, extra = student.init(rng, batch)
    given = {name: towers.inputs(batch, keys) for name, keys in clip.KEYS.items()}
    weights, stats = large.init(jax.random.fold_in(rng, 1), given)
    weights["log_scale"] = jnp.full((), math.log(100.0), jnp.float32)
    return params, extra | {"teacher": {"params": weights, **stats}}

  def loss(params, extra, batch, rng, step):
    del step
    params = towers.stop_locked(locked, params)
    h, x, y, stats = clip.encode_pairs(small, params, extra, batch, rng)
    ids = text_ids(batch["text"], batch["text_mask"]) if mask_duplicates else None
    value, metrics = clip.contrast(params, x, y, ids)

    taught = jax.lax.stop_gradient(extra["teacher"])
    _, u, v, _ = clip.encode_pairs(large, taught["params"], taught, batch, rng)
    teacher_scale = jnp.exp(taught["params"]["log_scale"])
    distill = losses.clip_distill(x, y, u, v, metrics["scale"], teacher_scale)
    aux = Aux(metrics | {"distill": distill}, jax.lax.stop_gradient(h))
    return value + weight * distill, (extra | stats, aux)

  return student._replace(init=init, loss=loss, locked=locked)
