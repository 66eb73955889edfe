"""clj against values and gradients that the official implementations gave.

One table, `TABLE`: golden file -> function. The function reads its inputs, shapes and
hyper-parameters from the file and returns what clj gives for everything else in it, by
name. What it neither reads nor answers has to stand in `EXEMPT` with the reason. Files
that another test compares stand in `ELSEWHERE`, and those of what clj does not have yet
in `NOT_YET`.
"""

import collections
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from clj import losses
from clj.data import text
from clj.evals import segmentation
from clj.evals.retrieval import ranking
from clj.losses import softmax
from clj.models.vit import resize_positions

TOLERANCE = 1e-5  # of each array's largest element, in float32

TABLE = {}

LOGITS = "an intermediate value; the loss and gradients made from it are compared"
INFO = "says how the file was made"
INDICES = "mined indices"
PILLOW = "for information: Pillow's operation, in 8 bits, its blur no Gaussian"
SCHEDULE = "a schedule; teacher_temp is its value"
BANK = "no bank of neighbours yet; the loss of the neighbours is compared"
TIES = "ranx has an order of its own for equal scores"
EXEMPT = {
  "augment_ops": {
    "pil_version": INFO,
    "image_uint8": "input of the pil_* arrays",
    "pil_solarize_default128": PILLOW,
    "pil_gaussian_blur_radius_sigma": PILLOW,
    "pil_brightness": PILLOW,
    "pil_contrast": PILLOW,
    "pil_saturation_color": PILLOW,
    "pil_grayscale_L": PILLOW,
  },
  "cpc_audio_infonce": {
    "n_predicts": "the length of W",
    "n_negatives": "the length of neg_batch_idx",
    "accuracy_per_step": "neither loss nor gradient",
  },
  "dino_v1": {
    "warmup_teacher_temp": SCHEDULE,
    "final_teacher_temp": SCHEDULE,
    "warmup_teacher_temp_epochs": SCHEDULE,
    "nepochs": SCHEDULE,
    "epoch": SCHEDULE,
  },
  "dist2_ntxent_simclr": {"precision": INFO},
  "metrics_retrieval": {
    "ranx_ndcg_cut_10_ties": TIES,
    "ranx_map_ties": TIES,
    "ranx_recip_rank_ties": TIES,
    "ranx_recall_10_ties": TIES,
  },
  "metrics_segmentation": {"jaccard_micro": "all classes as one; not reported by clj"},
  "nnclr": {
    "z0": BANK,
    "z1": BANK,
    "bank": BANK,
    "bank_size": BANK,
    "bank_ptr": BANK,
    "bank_after": BANK,
    "bank_ptr_after": BANK,
    "nn_index0": BANK,
    "nn_index1": BANK,
  },
  "pos_embed_interpolation": {
    "precision": INFO,
    "patch_size": "of the images; the grids are in patches",
  },
  "sbert_cached_symmetric": {
    "mini_batch_size": "does not divide the batch, as clj's chunks do",
  },
  "dpr_nll": {
    "hard_negative_idx": "the official loss does not use it",
    "correct": "neither loss nor gradient",
  },
  "moco_v1v2": {"logits": LOGITS, "queue_raw": "the queue before it was normalised"},
  "ntxent_simclr": {
    "logits_ab": LOGITS,
    "labels": LOGITS,
  },
  "pml_triplet": {
    "triplets": INDICES,
    "triplets_hard": INDICES,
    "triplets_all": INDICES,
  },
  "simcse_sup": {"logits": LOGITS},
  "simcse_sup_weighted": {"logits": LOGITS},
  "simcse_unsup": {"logits": LOGITS},
  "tfa_triplet": {"precision": INFO},
}

TOKENS = "clip_tokens"  # texts and ids, no arrays; `test_clip_tokens` answers it

ELSEWHERE = {  # file -> the test that compares it
  "layer_decay": "optim_test.py",
  "masks": "masks_test.py",
  "schedules": "schedules_test.py",
}

# File -> what is missing. A line goes when its case comes.
DINO_MODEL = "no layout of this checkpoint in clj/interop"
TEXT_MODEL = "no text tower of this kind"
NOT_YET = {
  "audio_frontends": "no audio",
  "dinov2_block": "no SwiGLU, no drop path of a fixed number of examples",
  "dist2_lejepa": "no LeJEPA",
  "dist4_lejepa": "no LeJEPA",
  "lejepa": "no LeJEPA",
  "lightgcn_propagation": "no graphs; `lightgcn_bpr` propagates in its own case",
  "matryoshka": "no Matryoshka loss",
  "metrics_coco": "no evaluation of detection",
  "metrics_sts": "no evaluation of sentence similarity",
  "mmcr": "no MMCR",
  "msn": "no MSN",
  "rope_dinov3": "no rotary positions",
  "sbert_distill": "neither MarginMSE nor the KL divergence of given scores",
  "sbert_gist": "no negatives masked by a guide",
  "tico": "no TiCo",
  "vicregl_local": "no VICReg of matched positions",
  "models/bert": TEXT_MODEL,
  "models/dinov2": DINO_MODEL,
  "models/dinov2_swiglu": DINO_MODEL,
  "models/dinov2_with_registers": DINO_MODEL,
  "models/dinov3_vit": DINO_MODEL,
  "models/dinov3_vit_swiglu": DINO_MODEL,
  "models/modernbert": TEXT_MODEL,
  "models/mpnet": TEXT_MODEL,
  "models/official_dinov2": DINO_MODEL,
  "models/official_dinov2_reg_swiglu": DINO_MODEL,
  "models/official_dinov3": DINO_MODEL,
  "models/official_dinov3_swiglu_untied": DINO_MODEL,
  "models/official_imagebind": "no audio, depth, thermal and motion towers",
  "models/roberta": TEXT_MODEL,
}


class Golden(dict):
  """The arrays of a file; remembers which were read. Scalars come as numbers."""

  def __init__(self, path):
    with np.load(path, allow_pickle=False) as arrays:
      super().__init__(arrays)
    self.read = set()

  def __getitem__(self, key):
    self.read.add(key)
    value = super().__getitem__(key)
    return value.item() if value.ndim == 0 else value


def golden(*names):
  """Enters a function into the table, under the names of its files."""

  def enter(fn):
    for name in names:
      TABLE[name] = fn
    return fn

  return enter


def grads(loss, suffix="", **inputs):
  """`loss<suffix>` and `grad_<input><suffix>` of `loss(**inputs)`, in float32."""
  inputs = {k: jnp.asarray(x, jnp.float32) for k, x in inputs.items()}
  value, given = jax.jit(jax.value_and_grad(lambda x: loss(**x)))(inputs)
  return {f"loss{suffix}": value} | {f"grad_{k}{suffix}": x for k, x in given.items()}


def on_ranks(loss, world, **inputs):
  """A form with `axis_name` on `world` devices, each with its part of every input.

  Gives the loss of each rank, and the gradient of their sum as every rank holds it.
  """
  if world > jax.device_count():
    pytest.skip(f"the file is of {world} processes, here are {jax.device_count()}")
  mesh = Mesh(np.array(jax.devices()[:world]), ("rank",), axis_types=(AxisType.Auto,))
  per_rank = jax.shard_map(
    lambda x: loss(**x, axis_name="rank")[None],
    mesh=mesh,
    in_specs=P("rank"),
    out_specs=P("rank"),
  )

  def total(inputs):
    values = per_rank(inputs)
    return values.sum(), values

  inputs = {k: jnp.asarray(x, jnp.float32) for k, x in inputs.items()}
  (_, values), given = jax.jit(jax.value_and_grad(total, has_aux=True))(inputs)
  answer = {"loss_per_rank": values, "loss": values.mean()}
  return answer | {f"grad_{k}": x for k, x in given.items()}


# Statistics of the batch.


@golden("barlow_twins")
def _(g):
  options = {"lambd": g["lambd"], "eps": g["bn_eps"]}
  return grads(lambda **z: losses.barlow_twins(**z, **options), z1=g["z1"], z2=g["z2"])


@golden("dist4_barlow_twins")
def _(g):
  # Biased: the gradient of each process is that of the loss, and DDP then averages.
  options = {"lambd": g["lambd"], "eps": g["bn_eps"], "groups": g["world_size"]}
  answer = grads(
    lambda **z: losses.barlow_twins(**z, **options), z1=g["z1"], z2=g["z2"]
  )
  return answer | {"loss_per_rank": np.full(g["world_size"], answer["loss"])}


def vicreg_weights(g):
  return g["sim_coeff"], g["std_coeff"], g["cov_coeff"]


@golden("vicreg")
def _(g):
  weights, eps = vicreg_weights(g), g["std_eps"]
  answer = grads(
    lambda x, y: losses.vicreg(x, y, *weights, eps=eps), x=g["x"], y=g["y"]
  )
  terms = losses.vicreg_terms(jnp.asarray(g["x"]), jnp.asarray(g["y"]), eps=eps)
  return answer | dict(zip(("term_sim", "term_std", "term_cov"), terms))


@golden("dist4_vicreg")
def _(g):
  weights = vicreg_weights(g)
  return on_ranks(
    lambda x, y, axis_name: losses.vicreg(x, y, *weights, axis_name=axis_name),
    g["world_size"],
    x=g["x"],
    y=g["y"],
  )


@golden("koleo")
def _(g):
  return grads(lambda x: losses.koleo(x, eps=g["eps"]), x=g["x"])


# Against a teacher.


@golden("byol")
def _(g):
  t1, t2 = jnp.asarray(g["target1"]), jnp.asarray(g["target2"])
  return grads(
    lambda prediction1, prediction2: (
      losses.byol(prediction1, t2) + losses.byol(prediction2, t1)
    ),
    prediction1=g["prediction1"],
    prediction2=g["prediction2"],
  )


def by_row(crop_major, views):
  """`[V B, ...]`, crop after crop -> `[B, V, ...]`."""
  shape = (views, len(crop_major) // views, *crop_major.shape[1:])
  return jnp.asarray(crop_major).reshape(shape).swapaxes(0, 1)


def swav_answer(g, queue_scores=None):
  views = g["n_global"] + g["n_local"]
  scores = by_row(g["scores"], views)
  assert len(scores) == g["batch_size"]
  codes = losses.swav_codes(
    scores[:, : g["n_global"]], queue_scores, g["epsilon"], g["sinkhorn_iterations"]
  )
  answer = grads(
    lambda scores: losses.swav(by_row(scores, views), codes, g["temperature"]),
    scores=g["scores"],
  )
  return answer | {"codes": codes.swapaxes(0, 1)}


@golden("swav")
def _(g):
  return swav_answer(g)


@golden("swav_queue")
def _(g):
  queue = jnp.asarray(g["queue"], jnp.float32).swapaxes(0, 1)
  embeddings = by_row(g["embeddings"], g["n_global"] + g["n_local"])
  new = embeddings[:, : g["n_global"]].astype(jnp.float32)
  scores = jnp.einsum(
    "lgd,kd->lgk", queue, g["prototypes"].astype(np.float32), precision="highest"
  )
  return swav_answer(g, scores) | {
    "queue_after": losses.push(queue, new).swapaxes(0, 1)
  }


@golden("dist4_swav_sinkhorn")
def _(g):
  options = g["epsilon"], g["sinkhorn_iterations"]
  mesh = Mesh(np.array(jax.devices()[: g["world_size"]]), ("rank",))
  codes = jax.shard_map(
    lambda scores: losses.sinkhorn(scores, *options, axis_name="rank"),
    mesh=mesh,
    in_specs=P("rank"),
    out_specs=P("rank"),
  )
  return {"codes": jax.jit(codes)(g["scores"])}


@golden("dino_v1")
def _(g):
  views = g["n_crops"]
  teacher = by_row(g["teacher"], len(g["teacher"]) // g["batch_size"])
  center = jnp.asarray(g["center"])
  target = losses.center_target(teacher, center, g["teacher_temp"])
  answer = grads(
    lambda student: losses.dino(by_row(student, views), target, g["student_temp"]),
    student=g["student"],
  )
  after = losses.update_center(center, teacher, g["center_momentum"])
  return answer | {"center_after": after}


@golden("simsiam")
def _(g):
  z1, z2 = jnp.asarray(g["z1"]), jnp.asarray(g["z2"])

  def loss(p1, p2):
    # BYOL's is 2 - 2 cos a direction, and the sum of both.
    return (losses.byol(p1, z2) + losses.byol(p2, z1) - 4) / 4

  return grads(loss, p1=g["p1"], p2=g["p2"])


@golden("dinov2_dino")
def _(g):
  teacher, center = jnp.asarray(g["teacher"]), jnp.asarray(g["center"])
  temperature, students = g["teacher_temp"], jnp.asarray(g["students"])
  chunks = len(teacher) // g["batch_size"]
  centered = losses.center_target(teacher, center, temperature)
  codes = losses.sinkhorn(teacher, temperature, g["sinkhorn_iterations"])
  after = losses.update_center(center, teacher, g["center_momentum"])
  second = losses.center_target(jnp.asarray(g["teacher_second"]), after, temperature)

  def loss(target):
    target = by_row(target, chunks)
    return lambda students: losses.dino(
      students.swapaxes(0, 1), target, g["student_temp"], pairs="v2"
    )

  return {
    **grads(loss(centered), students=students),
    **grads(loss(codes), "_sinkhorn", students=students),
    "teacher_probs_centered": centered,
    "teacher_probs_sinkhorn": codes,
    "teacher_probs_sinkhorn_float32": codes,
    "center_after": after,
    "teacher_second_probs_centered_after_update": second,
  }


@golden("dinov2_ibot_patch")
def _(g):
  masks, center = jnp.asarray(g["masks"]), jnp.asarray(g["center"])
  teacher, student_temp = jnp.asarray(g["teacher_masked"]), g["student_temp"]
  masked, temperature = g["n_masked"], g["teacher_temp"]
  target = losses.center_target(teacher, center, temperature)
  weight = losses.masked_weights(masks)[masks]

  def tokens(student):
    extra = len(student) - masked
    return losses.ibot_tokens(
      student,
      jnp.pad(target, ((0, extra), (0, 0))),
      jnp.pad(weight, (0, extra)),
      len(masks),
      student_temp,
    )

  full = losses.center_target(jnp.asarray(g["teacher_full"]), jnp.zeros(1), temperature)
  codes = losses.sinkhorn(teacher, temperature, g["sinkhorn_iterations"])
  padded = grads(tokens, student=g["student_padded"])
  masked_only = grads(tokens, student=g["student_masked"])
  whole = grads(
    lambda student: losses.ibot(student, full, masks, student_temp),
    student=g["student_full"],
  )
  return {
    "loss": masked_only["loss"],
    "grad_student_masked": masked_only["grad_student"],
    "loss_padded": padded["loss"],
    "grad_student_padded": padded["grad_student"],
    "loss_full": whole["loss"],
    "grad_student_full": whole["grad_student"],
    "teacher_probs_centered": target,
    "teacher_probs_sinkhorn": codes,
    "center_after": losses.update_center(center, teacher, g["center_momentum"]),
  }


@golden("ibot")
def _(g):
  batch, views = g["batch_size"], g["n_global"] + g["n_local"]
  teacher_cls, teacher_patch = (
    by_row(g["teacher_cls"], g["n_global"]),
    jnp.asarray(g["teacher_patch"]),
  )
  center, center2 = jnp.asarray(g["center"]), jnp.asarray(g["center2"])
  cls_target = losses.center_target(teacher_cls, center, g["teacher_temp"])
  patch_target = losses.center_target(teacher_patch, center2, g["teacher_temp2"])
  mask = jnp.asarray(g["student_mask"]).reshape(g["n_global"] * batch, -1)
  lambda1, lambda2, temperature = g["lambda1"], g["lambda2"], g["student_temp"]

  def parts(student_cls, student_patch, student_local_cls):
    student = by_row(jnp.concatenate([student_cls, student_local_cls]), views)
    return (
      lambda1 * losses.dino(student, cls_target, temperature),
      lambda2 * losses.ibot(student_patch, patch_target, mask, temperature),
    )

  students = {
    k: jnp.asarray(g[k]) for k in ("student_cls", "student_patch", "student_local_cls")
  }
  loss_cls, loss_patch = parts(**students)
  return {
    **grads(lambda **x: sum(parts(**x)), **students),
    "loss_cls": loss_cls,
    "loss_patch": loss_patch,
    "center_after": losses.update_center(center, teacher_cls, g["center_momentum"]),
    "center2_after": losses.update_center(
      center2, teacher_patch, g["center_momentum2"]
    ),
  }


@golden("dinov3_gram")
def _(g):
  teacher, answer = jnp.asarray(g["teacher"]), {}
  kinds = {
    "remove_neg": {"negatives": "clip"},
    "plain": {},
    "remove_only_teacher_neg": {"negatives": "clip_teacher"},
    "nonorm": {"normalize": False},
  }
  for kind, options in kinds.items():
    for suffix, level in (("img", "image"), ("batch", "batch")):
      answer |= grads(
        lambda student, options=options, level=level: losses.gram(
          student, teacher, level=level, **options
        ),
        f"_{kind}_{suffix}",
        student=g["student"],
      )
  return answer | {
    "loss": answer["loss_plain_batch"],
    "grad_student": answer["grad_student_plain_batch"],
  }


# Triplets.


@golden("triplet_optax")
def _(g):
  options = {"margin": g["margin"], "norm_degree": g["norm_degree"], "eps": g["eps"]}
  inputs = {k: g[k] for k in ("anchor", "positive", "negative")}
  each = losses.triplet(*map(jnp.asarray, inputs.values()), **options, reduction="none")
  answer = grads(lambda **x: losses.triplet(**x, **options), **inputs)
  return answer | {"per_example": each}


@golden("tfa_triplet")
def _(g):
  label, margin, embeddings = jnp.asarray(g["labels"]), g["margin"], g["embeddings"]

  def variant(suffix, fn, **options):
    return grads(
      lambda embeddings: fn(embeddings, label, margin, **options),
      suffix,
      embeddings=embeddings,
    )

  return {
    **variant("", losses.triplet_semihard),
    **variant("_squared", losses.triplet_semihard, squared=True),
    **variant("_hard", losses.triplet_batch_hard),
    **variant("_hard_soft", losses.triplet_batch_hard, soft=True),
  }


@golden("pml_triplet")
def _(g):
  label, margin, answer = jnp.asarray(g["labels"]), g["margin"], {}
  for suffix, mining in (("", "semihard"), ("_hard", "hard"), ("_all", "all")):
    answer |= grads(
      lambda embeddings, mining=mining: losses.triplet_batch_all(
        losses.l2_normalize(embeddings), label, margin, mining=mining
      ),
      suffix,
      embeddings=g["embeddings"],
    )
  return answer


# Softmax over the batch, a queue, all nodes.


@golden("ntxent_simclr")
def _(g):
  temperature, batch = g["temperature"], g["batch_size"]

  def loss(z):
    # The official code adds the two directions where the paper takes the mean.
    return 2 * losses.nt_xent(z[:batch], z[batch:], temperature)

  cold = g["temperature_unnormalised"]

  def unnormalised(z):
    # Rows of both views among the others of both, on the primitive itself.
    z1, z2 = z[:batch], z[batch:]
    m = softmax.log_sum_exp_self(z1, z2, 1 / cold)
    return sum(jnp.mean(jax.nn.softplus(one)) for one in m)

  answer = grads(loss, z=g["z"])
  return {
    **answer,
    **grads(unnormalised, "_unnormalised", z=g["z"]),
    "loss_float32_asis": answer["loss"],
  }


@golden("ntxent_lightly")
def _(g):
  return grads(
    lambda z0, z1: losses.nt_xent(z0, z1, g["temperature"]), z0=g["z0"], z1=g["z1"]
  )


@golden("ntxent_optax")
def _(g):
  answer = {}
  for suffix in ("", "_multi"):
    label = jnp.asarray(g[f"labels{suffix}"])
    answer |= grads(
      lambda embeddings, label=label: losses.nt_xent_labels(
        embeddings, label, g["temperature"]
      ),
      suffix,
      embeddings=g["embeddings"],
    )
  return answer


@golden("dcl")
def _(g):
  # Without the positive in the denominator: the primitive, whose logits are relative to
  # the positive's, without the softplus.
  scale, unit = 1 / g["temperature"], losses.l2_normalize

  def both(z0, z1):
    m0, m1 = softmax.log_sum_exp_self(z0, z1, scale, normalize=True)
    return jnp.mean(m0 + m1) / 2

  def cosine(z0, z1):
    return jnp.sum(unit(z0) * unit(z1), axis=1)

  def weights(z0, z1):
    return 2 - len(z0) * jax.nn.softmax(cosine(z0, z1) / g["sigma"])

  def weighted(z0, z1):
    weight = jax.lax.stop_gradient(weights(z0, z1))
    return both(z0, z1) + jnp.mean((1 - weight) * scale * cosine(z0, z1))

  inputs = {k: jnp.asarray(g[k], jnp.float32) for k in ("z0", "z1")}
  return {
    **grads(both, **inputs),
    **grads(weighted, "_weighted", **inputs),
    "weights": weights(**inputs),
  }


@golden("graphcl")
def _(g):
  # Neither has this the positive in the denominator.
  def loss(x, x_aug):
    return jnp.mean(
      softmax.log_sum_exp(x, x_aug, 1 / g["temperature"], aligned=True, normalize=True)
    )

  return grads(loss, x=g["x"], x_aug=g["x_aug"])


@golden("nnclr")
def _(g):
  nn0, nn1 = (jnp.asarray(g[k], jnp.float32) for k in ("nn0", "nn1"))

  def loss(p0, p1):
    # lightly's form: the neighbours are rows, too.
    one_way = lambda z, p: losses.nt_xent(z, p, g["temperature"])
    return (one_way(nn0, p1) + one_way(nn1, p0)) / 2

  return grads(loss, p0=g["p0"], p1=g["p1"])


@golden("dist2_ntxent_simclr")
def _(g):
  ranks = len(g["per_replica_hidden"])
  temperature, b = g["temperature"], g["batch_size"] // ranks

  def loss(hidden, axis_name):
    z1, z2 = hidden[0, :b], hidden[0, b:]
    return 2 * losses.nt_xent(z1, z2, temperature, axis_name=axis_name)

  answer = on_ranks(loss, ranks, hidden=g["per_replica_hidden"])
  # The same rows, whole.
  z = g["z"].reshape(2, ranks, b, -1).swapaxes(0, 1)
  np.testing.assert_array_equal(
    z.reshape(g["per_replica_hidden"].shape), g["per_replica_hidden"]
  )
  return {
    "loss": answer["loss"],
    "loss_per_replica": answer["loss_per_rank"],
    "grad_per_replica_hidden": answer["grad_hidden"],
  }


@golden("moco_v1v2")
def _(g):
  key, queue = jnp.asarray(g["k"]), jnp.asarray(g["queue"], jnp.float32).T
  after, pointer = losses.enqueue(queue, jnp.asarray(g["queue_ptr"]), key)
  answer = grads(lambda q: losses.moco(q, key, queue, g["temperature"]), q=g["q"])
  return answer | {"queue_after": after.T, "queue_ptr_after": pointer}


@golden("moco_v3")
def _(g):
  k1, k2, temperature = jnp.asarray(g["k1"]), jnp.asarray(g["k2"]), g["temperature"]
  loss = lambda q1, q2: losses.moco_v3(q1, q2, k1, k2, temperature)
  q1, q2 = jnp.asarray(g["q1"]), jnp.asarray(g["q2"])
  # Of a query and its own direction twice, half.
  first = losses.moco_v3(q1, q1, k2, k2, temperature) / 2
  return grads(loss, q1=q1, q2=q2) | {"loss_q1_k2": first}


@golden("dist4_moco_v3")
def _(g):
  answer = on_ranks(
    lambda q1, q2, k1, k2, axis_name: losses.moco_v3(
      q1, q2, k1, k2, g["temperature"], axis_name=axis_name
    ),
    g["world_size"],
    **{k: g[k] for k in ("q1", "q2", "k1", "k2")},
  )
  for key in ("grad_k1", "grad_k2"):
    assert not np.any(answer.pop(key)), "keys get no gradient"
  return answer


@golden("simcse_unsup", "simcse_sup", "simcse_sup_weighted")
def simcse(g, name):
  names = ("z1", "z2") if name == "simcse_unsup" else ("z1", "z2", "z3")
  weight = 0.0 if name == "simcse_unsup" else g["hard_negative_weight"]

  def loss(z1, z2, z3=None):
    return losses.simcse(z1, z2, g["temperature"], negative=z3, negative_weight=weight)

  return grads(loss, **{k: g[k] for k in names})


@golden("dist4_simcse_unsup")
def _(g):
  # Biased: each process has the gradient of its rows, and DDP then averages.
  answer = grads(
    lambda z1, z2: losses.simcse(z1, z2, g["temperature"]), z1=g["z1"], z2=g["z2"]
  )
  return answer | {"loss_per_rank": np.full(g["world_size"], answer["loss"])}


@golden("sbert_mnrl")
def _(g):
  scale = g["scale"]
  unit = losses.l2_normalize

  def one_way(anchor, positive, negative=None):
    negative = None if negative is None else unit(negative)
    return losses.info_nce(unit(anchor), unit(positive), 1 / scale, negatives=negative)

  def symmetric(anchor, positive):
    return losses.info_nce(unit(anchor), unit(positive), 1 / scale, symmetric=True)

  def all_directions(anchor, positive):
    q, d = unit(anchor), unit(positive)
    reference = jnp.sum(q * d, axis=1)
    number = jnp.arange(len(q))
    others = [
      softmax.log_sum_exp(
        x, y, scale, reference=reference, row_ids=number, col_ids=number
      )
      for x, y in ((q, d), (q, q), (d, q), (d, d))
    ]
    # The positive is in two of the four, and 0 relative to itself.
    m = jax.nn.logsumexp(jnp.stack([*others, jnp.zeros(len(q))]), axis=0)
    return jnp.mean(jax.nn.softplus(m))

  pair = {k: g[k] for k in ("anchor", "positive")}
  return {
    **grads(one_way, **pair),
    **grads(one_way, "_with_negative", **pair, negative=g["negative"]),
    **grads(symmetric, "_symmetric", **pair),
    **grads(all_directions, "_gte_all_directions", **pair),
  }


@golden("sbert_cached_symmetric")
def _(g):
  scale = g["scale"]
  unit = lambda z: losses.encode_in_chunks(losses.l2_normalize, z, 4)

  def loss(anchor, positive, negative=None, symmetric=True):
    return losses.info_nce(
      unit(anchor),
      unit(positive),
      1 / scale,
      negatives=None if negative is None else unit(negative),
      symmetric=symmetric,
    )

  def one_way(**x):
    return loss(**x, symmetric=False)

  pair = {k: g[k] for k in ("anchor", "positive")}
  return {
    **grads(loss, **pair),
    **grads(loss, "_with_negative", **pair, negative=g["negative"]),
    **grads(one_way, "_oneway_with_negative", **pair, negative=g["negative"]),
  }


@golden("dpr_nll")
def _(g):
  positive = jnp.asarray(g["positive_idx"])
  return grads(
    lambda q, ctx: losses.dense_retrieval(q, ctx, positive), q=g["q"], ctx=g["ctx"]
  )


@golden("cpc_audio_infonce")
def _(g):
  negatives = jnp.asarray(g["neg_batch_idx"]), jnp.asarray(g["neg_time_idx"])

  def each(c, z, W):  # noqa: N803
    # CPC_audio takes the mean over dimensions.
    return losses.cpc(c, z, W, z.shape[-1], negatives=negatives, reduction="steps")

  inputs = {k: jnp.asarray(g[k]) for k in ("c", "z", "W")}
  answer = grads(lambda **x: each(**x).sum(), **inputs)
  return answer | {"loss_per_step": each(**inputs)}


# Two and three modalities.


@golden("open_clip_clip", "open_clip_siglip", "open_clip_siglip_nobias")
def open_clip(g, name):
  answer = {}
  for suffix, unit in (("", losses.l2_normalize), ("_unnormalised", lambda x: x)):
    scalars = {"logit_scale": g[f"logit_scale{suffix}"]}
    if name == "open_clip_siglip":
      scalars["logit_bias"] = g["logit_bias"]

    def loss(image, text, logit_scale, logit_bias=0.0, unit=unit):
      image, text = unit(image), unit(text)
      if name == "open_clip_clip":
        return losses.clip(image, text, logit_scale)
      return losses.siglip(image, text, logit_scale, logit_bias)

    answer |= grads(loss, suffix, image=g["image"], text=g["text"], **scalars)
  return answer


def clip_on_ranks(g, loss):
  """open_clip's losses on several processes; a replicated scalar is one a rank."""
  world = g["world_size"]
  names = [k for k in ("logit_scale", "logit_bias") if k in g]

  def local(image, text, axis_name, **scalars):
    image, text = losses.l2_normalize(image), losses.l2_normalize(text)
    scalars = [scalars[k][0] for k in names]
    return loss(image, text, *scalars, axis_name=axis_name)

  scalars = {k: np.full(world, g[k]) for k in names}
  answer = on_ranks(local, world, image=g["image"], text=g["text"], **scalars)
  for k in names:
    answer[f"grad_{k}_per_rank"] = answer.pop(f"grad_{k}")
  return answer


@golden(
  *(f"dist4_open_clip_siglip_{k}" for k in ("bidir", "gather", "reduce", "shift"))
)
def _(g):
  return clip_on_ranks(g, losses.siglip)


@golden(*(f"dist4_open_clip_local{i}_gathergrad{j}" for i in (0, 1) for j in (0, 1)))
def _(g):
  world, local, with_grad = g["world_size"], g["local_loss"], g["gather_with_grad"]
  if local:
    # Biased without a gradient through the gather: the keys are constants, so that a
    # row's part in the softmaxes of other processes is missing.
    constant = (lambda x: x) if with_grad else jax.lax.stop_gradient

    def two_ways(image, text, scale, axis_name):
      one_way = lambda x, y: losses.info_nce(
        x, constant(y), 1 / scale, axis_name=axis_name
      )
      return (one_way(image, text) + one_way(text, image)) / 2

    answer = clip_on_ranks(g, two_ways)
    if with_grad:
      # `clip` itself, but that another rank may hold a part of the scale's gradient.
      exact, of_scale = clip_on_ranks(g, losses.clip), "grad_logit_scale_per_rank"
      want = answer[of_scale].mean()
      np.testing.assert_allclose(exact.pop(of_scale).mean(), want, rtol=1e-5)
      answer |= exact
    return answer
  # Every process has the whole loss.
  unit = losses.l2_normalize
  answer = grads(
    lambda image, text, scale: losses.clip(unit(image), unit(text), scale),
    image=g["image"],
    text=g["text"],
    scale=g["logit_scale"],
  )
  # Without a gradient through the gather each process has that of its rows once, and
  # DDP then averages: 1 / processes of the towers' gradient, but all of the scale's.
  factor = world if with_grad else 1
  return {
    "loss": answer["loss"],
    "loss_per_rank": np.full(world, answer["loss"]),
    "grad_image": factor * answer["grad_image"],
    "grad_text": factor * answer["grad_text"],
    "grad_logit_scale_per_rank": np.full(world, answer["grad_scale"]),
  }


@golden("open_clip_distill")
def _(g):
  unit = losses.l2_normalize
  teacher = [unit(jnp.asarray(g[f"teacher_{k}"])) for k in ("image", "text")]
  teacher_scale = g["teacher_logit_scale"]

  def contrastive(image, text, logit_scale):
    return losses.clip(unit(image), unit(text), logit_scale)

  def distill(image, text, logit_scale):
    return losses.clip_distill(
      unit(image), unit(text), *teacher, logit_scale, teacher_scale
    )

  inputs = {k: g[k] for k in ("image", "text", "logit_scale")}
  return {
    **grads(lambda **x: contrastive(**x) + distill(**x), **inputs),
    **grads(distill, "_distill", **inputs),
    "loss_contrastive": grads(contrastive, **inputs)["loss"],
  }


@golden("audioclip")
def _(g):
  modalities = ("audio", "image", "text")
  pairs = ("audio_image", "audio_text", "image_text")
  scales = {f"log_scale_{pair}": g[f"log_scale_{pair}"] for pair in pairs}
  answer = grads(losses.audioclip, **{k: g[k] for k in modalities}, **scales)
  for pair in pairs:

    def loss(pair=pair, **given):
      return losses.audioclip(*(given.get(k) for k in modalities), **scales)

    answer |= grads(loss, f"_{pair}", **{k: g[k] for k in pair.split("_")})
  return answer


# Recommendation.


@golden("lightgcn_bpr")
def _(g):
  users, pos, neg = (jnp.asarray(g[k]) for k in ("users", "pos", "neg"))
  adjacency, layers = jnp.asarray(g["adj_norm"], jnp.float32), g["n_layers"]
  inputs = {k: jnp.asarray(g[k]) for k in ("user_emb0", "item_emb0")}
  interactions = g["interactions"]
  between = np.sqrt(np.outer(interactions.sum(1), interactions.sum(0)))
  block = np.where(interactions, 1 / np.maximum(between, 1), 0)
  count = len(interactions)
  np.testing.assert_allclose(g["adj_norm"][:count, count:], block, atol=1e-7)

  def propagate(user_emb0, item_emb0):
    layer = jnp.concatenate([user_emb0, item_emb0])
    total = layer
    for _ in range(layers):
      layer = jnp.matmul(adjacency, layer, precision="highest")
      total += layer
    return jnp.split(total / (layers + 1), [count])

  def bpr(**x):
    user, item = propagate(**x)
    return losses.bpr(user[users], item[pos], item[neg])

  def regulariser(user_emb0, item_emb0):
    batch = user_emb0[users], item_emb0[pos], item_emb0[neg]
    return losses.l2_penalty(*batch) / len(users)

  only_bpr = grads(bpr, "_bpr", **inputs)
  user, item = propagate(**inputs)
  return {
    **grads(lambda **x: bpr(**x) + g["decay"] * regulariser(**x), **inputs),
    "loss_bpr": only_bpr["loss_bpr"],
    "grad_user_emb0_bpr": only_bpr["grad_user_emb0_bpr"],
    "grad_item_emb0_bpr": only_bpr["grad_item_emb0_bpr"],
    "loss_reg": regulariser(**inputs),
    "final_user_emb": user,
    "final_item_emb": item,
  }


@golden("sgl_ssl")
def _(g):
  users, pos, neg = (g[k] for k in ("users", "pos_items", "neg_items"))
  temperature, weight, reg = g["ssl_temp"], g["ssl_reg"], g["reg"]
  sides = {"user": users, "item": pos}

  def all_nodes(side, sub1, sub2):
    return weight * losses.sgl(sub1, sub2, jnp.asarray(sides[side]), temperature)

  def in_batch(side, sub1, sub2):
    index = sides[side]
    return weight * losses.sgl(
      sub1[index], sub2[index], jnp.arange(len(index)), temperature
    )

  def both(fn):
    return lambda **x: sum(
      fn(side, x[f"{side}_sub1"], x[f"{side}_sub2"]) for side in sides
    )

  def merged(user_sub1, user_sub2, item_sub1, item_sub2):
    user, item = np.unique(users), np.unique(pos)
    sub1 = jnp.concatenate([user_sub1[user], item_sub1[item]])
    sub2 = jnp.concatenate([user_sub2[user], item_sub2[item]])
    return weight * losses.sgl(sub1, sub2, jnp.arange(len(sub1)), temperature)

  inputs = {f"{side}_sub{i}": g[f"{side}_sub{i}"] for side in sides for i in (1, 2)}
  answer = {
    **grads(both(all_nodes), **inputs),
    **grads(both(in_batch), "_inbatch", **inputs),
    **grads(merged, "_merge", **inputs),
  }
  for side in sides:
    answer |= grads(
      lambda side=side, **x: all_nodes(side, x[f"{side}_sub1"], x[f"{side}_sub2"]),
      f"_{side}_side",
      **{f"{side}_sub{i}": g[f"{side}_sub{i}"] for i in (1, 2)},
    )

  final = {f"final_{side}": g[f"final_{side}"] for side in sides}
  ego = {f"ego_{side}": g[f"ego_{side}"] for side in sides}

  def bpr(final_user, final_item):
    rows = final_user[users], final_item[pos], final_item[neg]
    return losses.bpr(*rows, reduction="sum")

  def regulariser(ego_user, ego_item):
    return reg * losses.l2_penalty(ego_user[users], ego_item[pos], ego_item[neg])

  ranking, penalty = grads(bpr, **final), grads(regulariser, **ego)
  return {
    **answer,
    "loss_bpr": ranking.pop("loss"),
    "loss_emb_reg": penalty.pop("loss"),
    **{f"{k}_bprreg": x for k, x in (ranking | penalty).items()},
  }


@golden("tfrs_retrieval")
def _(g):
  batch = len(g["query"])
  ids, weights = jnp.asarray(g["candidate_ids"]), jnp.asarray(g["sample_weight"])
  probability = jnp.asarray(g["sampling_prob"])
  cooled = {"temperature": g["temperature"]}
  logq = {"probability": probability[:batch]}
  hits = {"ids": ids[:batch]}
  full = cooled | logq | hits

  def variant(suffix, options):
    def loss(query, candidate):
      return losses.sampled_softmax(query, candidate, **options, reduction="sum")

    return grads(loss, suffix, query=g["query"], candidate=g["candidate"])

  def extra(query, candidate):
    return losses.sampled_softmax(
      query,
      candidate[:batch],
      **full,
      negatives=candidate[batch:],
      negative_probability=probability[batch:],
      negative_ids=ids[batch:],
      reduction="sum",
    )

  return {
    **variant("_plain", {}),
    **variant("_temperature", cooled),
    **variant("_logq", cooled | logq),
    **variant("_hits", cooled | hits),
    **variant("", full),
    **variant("_weighted", full | {"weights": weights}),
    **grads(extra, "_extra", query=g["query"], candidate=g["candidate_with_extra"]),
    **variant("_hardneg", cooled | logq | {"hard_negatives": g["num_hard_negatives"]}),
  }


# LARS.


PARAMETERS = ("w1", "b1", "w2", "gamma", "w0")


@golden(
  "lars_barlow",
  "lars_barlow_nofilter",
  "lars_barlow_varlr",
  "lars_byol",
  "lars_mocov3",
  "lars_optax",
  "lars_optax_nesterov",
  "lars_optax_nomask",
  "lars_optax_varlr",
  "lars_simclr",
  "lars_simclr_nesterov",
  "lars_simclr_popular",
  "lars_simclr_varlr",
  "lars_vicreg",
)
def lars(g, name):
  import optax

  from clj import optim

  excluded = "" if name.endswith(("nofilter", "nomask")) else r"^(b1|gamma)$"
  source = name.split("_")[1]
  form = "inside" if source in ("simclr", "optax") else "outside"
  # What the files call the momentum, and its sign.
  slot, sign = {"simclr": ("momentum", 1), "optax": ("trace", -1)}.get(
    source, ("mu", 1)
  )
  rates = jnp.asarray(g["lr_per_step"], jnp.float32)
  tx = optim.lars(
    lambda step: rates[step],
    momentum=g["momentum"],
    nesterov=name.endswith("nesterov"),
    trust_coefficient=g["eta"],
    weight_decay=g["weight_decay"],
    form="popular" if name.endswith("popular") else form,
    no_decay=excluded,
    no_adaptation=excluded,
  )
  params = {k: jnp.asarray(g[f"param_{k}"]) for k in PARAMETERS}
  state, answer = tx.init(params), {}

  @jax.jit
  def step(gradient, state, params):
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  for i in range(1, len(rates) + 1):
    gradient = {k: jnp.asarray(g[f"gradient_step{i}_{k}"]) for k in PARAMETERS}
    params, state = step(gradient, state, params)
    for k in PARAMETERS:
      answer[f"param_after{i}_{k}"] = params[k]
      answer[f"{slot}_after{i}_{k}"] = sign * state.momentum[k]
  return answer


for _name in [name for name in TABLE if name.startswith("lars_")]:
  EXEMPT[_name] = {
    "lr": "lr_per_step repeats it",
    "precision": INFO,
    "variable_names": "the official exclusion is by these names",
  }


# Augmentations.


@golden("augment_ops")
def _(g):
  from clj.augment import operations as augment

  planar = lambda x: jnp.moveaxis(jnp.asarray(x, jnp.float32), -1, -3)
  image = planar(g["image"])
  factors = [g[f"{k}_factor"] for k in ("brightness", "contrast", "saturation")]
  delta, sigma, size = g["hue_delta"], g["blur_sigma"], g["blur_kernel_size"]
  bright, contrast, saturation = factors
  even = g["simclr_blur_even_kernel_size_input"]
  # The file holds the blurred impulse and not the impulse.
  height, width, _ = dict.__getitem__(g, "simclr_blur_of_delta").shape
  impulse = jnp.zeros((3, height, width)).at[:, height // 2, width // 2].set(1)
  additive = g["byol_brightness_delta"]

  @jax.jit
  def all_of_them(image, impulse):
    both = {
      "contrast": augment.contrast(image, contrast),
      "saturation": augment.saturation(image, saturation),
      "hue": augment.hue(image, delta),
      "grayscale": augment.grayscale(image),
      "blur": augment.gaussian_blur(image, sigma, size),
    }
    jitter = augment.color_jitter(image, (*factors, delta))
    return {
      **{f"{name}_{k}": x for name in ("simclr", "byol") for k, x in both.items()},
      "simclr_brightness": augment.brightness(image, bright),
      "simclr_color_jitter_fixed_order": jitter,
      "simclr_blur_of_delta": augment.gaussian_blur(impulse, sigma, size),
      "simclr_blur_even": augment.gaussian_blur(image, sigma, even),
      "byol_brightness": augment.brightness_additive(image, additive),
      "byol_hsv": augment.rgb_to_hsv(image),
      "byol_solarize_0p5": augment.solarize(image, 0.5),
    }

  images = all_of_them(image, impulse)
  return {name: jnp.moveaxis(x, -3, -1) for name, x in images.items()}


# Positions of a ViT.


@golden("pos_embed_interpolation")
def _(g):
  cls, table = jnp.asarray(g["pos_embed"][0, :1]), jnp.asarray(g["pos_embed"][0, 1:])
  side, grids = int(len(table) ** 0.5), g["grids"].tolist()
  offset = g["interpolate_offset"]
  forms = {
    "out_size": {"antialias": False},
    "out_offset": {"antialias": False, "offset": offset},
    "out_size_antialias": {},
    "out_offset_antialias": {"offset": offset},
  }

  def resized(table, grid, options):
    table = table.reshape(side, side, -1)
    patches = resize_positions(table, *grid, **options)
    return jnp.concatenate([cls, patches.reshape(-1, table.shape[-1])])[None]

  @jax.jit
  def all_of_them(table):
    return {
      f"{name}_{i}": resized(table, grid, options)
      for name, options in forms.items()
      for i, grid in enumerate(grids)
    }

  answer = all_of_them(table)
  for i in range(len(grids)):
    answer[f"hf_dinov2_{i}"] = answer[f"out_size_{i}"]
    answer[f"hf_dinov2_with_registers_{i}"] = answer[f"out_size_antialias_{i}"]
  return answer


# Evaluations.


@golden("metrics_retrieval")
def _(g):
  ours = {
    "ndcg_cut_10": "ndcg@10",
    "map": "map",
    "map_cut_10": "map@10",
    "recip_rank": "mrr",
    "recall_10": "recall@10",
    "recall_20": "recall@20",
    "P_10": "precision@10",
  }
  relevance, answer = g["relevance"], {}
  for suffix in ("", "_ties"):
    found = ranking(g[f"score{suffix}"], relevance, ks=(10, 20))
    answer |= {f"{theirs}{suffix}": found[name] for theirs, name in ours.items()}
  # ranx was not given the queries without a relevant document.
  asked = (relevance > 0).any(1)
  for name in ("ndcg_cut_10", "map", "recip_rank", "recall_10"):
    answer[f"ranx_{name}"] = np.where(asked, answer[name], np.nan)
  return answer


@golden("metrics_recommendation")
def _(g):
  # Items of the training set come last, and users without a test item do not count.
  score = np.where(g["train_mask"], -np.inf, g["score"])
  asked, ks = g["test_mask"].any(1), g["topks"].tolist()
  found = ranking(score, g["test_mask"], ks=tuple(ks))
  found = {name: np.where(asked, x, np.nan) for name, x in found.items()}
  answer = {}
  for name in ("recall", "precision", "ndcg"):
    per_user = np.stack([found[f"{name}@{k}"] for k in ks], axis=1)
    answer[name] = np.nanmean(per_user, axis=0)
    if name != "precision":
      answer[f"{name}_per_user"] = per_user
  for name in ("recall", "ndcg", "map", "mrr"):
    answer[f"foldout_{name}20"] = np.nanmean(found[f"{name}@20"])
  return answer


@golden("metrics_segmentation")
def _(g):
  prediction, target = g["prediction"], g["target"]
  options = {"num_classes": g["num_classes"], "ignore": g["ignore_index"]}
  each = [
    segmentation.confusion(*image, **options) for image in zip(prediction, target)
  ]
  matrix = sum(each)
  found = segmentation.scores(matrix)
  per_image = [segmentation.scores(one)["miou"] for one in each]
  return {
    "confusion": matrix,
    # torchmetrics gives 0 to a class that is nowhere, and leaves it out of the mean.
    "iou_per_class": np.nan_to_num(found["iou"]),
    "jaccard_macro": found["miou"],
    "jaccard_weighted": found["fwiou"],
    "miou_dataset_nanmean": found["miou"],
    "miou_per_image_mean": np.mean(per_image),
    "all_accuracy": found["pixel_accuracy"],
    "mean_class_accuracy_nanmean": found["mean_accuracy"],
    "mmseg_iou": found["iou"],
    "mmseg_acc": found["accuracy"],
    "mmseg_dice": found["dice"],
    "mmseg_miou": found["miou"],
    "mmseg_macc": found["mean_accuracy"],
    "mmseg_mdice": found["mean_dice"],
    "mmseg_aacc": found["pixel_accuracy"],
  }


# The table against the directories.

MODEL = ("config.json", "golden.npz", "model.safetensors")  # one line for the three


def files_of(directory):
  """The names that need a line: paths without their ending, a model's folder once."""
  names = set()
  for folder, _, files in os.walk(directory, followlinks=True):
    inside = os.path.relpath(folder, directory)
    if inside.startswith("models" + os.sep) and set(files) == set(MODEL):
      names.add(inside)
      continue
    paths = (os.path.normpath(os.path.join(inside, file)) for file in files)
    names |= {os.path.splitext(path)[0] for path in paths if path != "README.md"}
  return names


def test_every_file_has_one_line(golden_dirs):
  lines = collections.Counter([*TABLE, TOKENS, *ELSEWHERE, *NOT_YET])
  count = collections.Counter(name for path in golden_dirs for name in files_of(path))
  several = sorted(name for name in count if count[name] > 1)
  assert not several, f"in more than one directory: {several}"
  files = set(count)
  without = sorted(files - set(lines))
  assert not without, f"no line for {without}"
  twice = sorted(name for name in lines if lines[name] > 1)
  assert not twice, f"more than one line for {twice}"
  if len(golden_dirs) == 1:
    pytest.skip(
      f"only {golden_dirs[0]!r}; lines of other directories are not looked at"
    )
  gone = sorted(set(lines) - files)
  assert not gone, f"lines without a file: {gone}"


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_what_is_compared_elsewhere(name):
  path = os.path.join(os.path.dirname(__file__), ELSEWHERE[name])
  assert os.path.exists(path), f"{name}: there is no {ELSEWHERE[name]}"
  with open(path) as file:
    assert re.search(rf'["/]{name}(\.npz)?"', file.read()), f"{path}: no {name}"


@pytest.mark.parametrize("name", sorted(TABLE))
def test_golden(golden_file, name):
  g = Golden(golden_file(f"{name}.npz"))
  fn = TABLE[name]
  answer = fn(g, name) if fn in (lars, open_clip, simcse) else fn(g)
  exempt = set(EXEMPT.get(name, ()))
  read = set(g.read)
  assert not read & set(answer), "an answer must not be read from the file"
  assert not exempt & (read | set(answer)), "exempt, and yet read or answered"
  unanswered = set(g) - set(answer) - read - exempt
  assert not unanswered, f"neither read, answered nor exempt: {sorted(unanswered)}"
  assert set(answer) <= set(g), f"not in the file: {sorted(set(answer) - set(g))}"
  for key, value in answer.items():
    want, got = np.asarray(dict.__getitem__(g, key)), np.asarray(value, np.float64)
    compare(key, got, want)


def compare(key, got, want):
  assert got.shape == want.shape, f"{key}: {got.shape} in place of {want.shape}"
  nan = np.isnan(want)
  np.testing.assert_array_equal(np.isnan(got), nan, err_msg=f"{key}: NaN")
  got, want = got[~nan], want[~nan]
  limit = TOLERANCE * np.max(np.abs(want))
  worst = np.max(np.abs(got - want))
  assert worst <= limit, f"{key}: off by {worst:.2e}, {limit:.2e} allowed"


def test_clip_tokens(golden_file, tfds_data_dir):
  vocabulary = os.path.join(tfds_data_dir, "tokenizers", "bpe_simple_vocab_16e6.txt.gz")
  if not os.path.isfile(vocabulary):
    pytest.skip(f"no vocabulary of CLIP at {vocabulary!r}")
  with open(golden_file(f"{TOKENS}.json")) as file:
    golden = json.load(file)
  texts, want = [entry["text"] for entry in golden], [entry["ids"] for entry in golden]
  want = np.array(want)
  length = want.shape[1]
  tokenizer = text.open_tokenizer(vocabulary, length=length)
  ids, mask, truncated = tokenizer.encode(texts)
  np.testing.assert_array_equal(ids, want)
  assert tokenizer.vocab_size == 49408
  # A text is cut whose row in the file ends before its words do.
  longer = text.open_tokenizer(vocabulary, length=max(map(len, texts)) + 2)
  whole, _, none = longer.encode(texts)
  end = 49407
  assert none == 0
  assert truncated == np.sum((whole == end).argmax(1) > (want == end).argmax(1))
  # Padding is the id of "!", so only the end token tells where it begins.
  np.testing.assert_array_equal(mask.sum(1), (want == end).argmax(1) + 1)
