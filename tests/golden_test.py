"""clj against values and gradients that the official implementations gave.

One table, `TABLE`: golden file -> function. The function reads its inputs, shapes and
hyper-parameters from the file and returns what clj gives for everything else in it, by
name. What it neither reads nor answers has to stand in `EXEMPT` with the reason.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from clj import losses

TOLERANCE = 1e-5  # of each array's largest element, in float32

TABLE = {}

LOGITS = "an intermediate value; the loss and gradients made from it are compared"
INFO = "says how the file was made"
INDICES = "mined indices"
PILLOW = "for information: Pillow's operation, in 8 bits, its blur no Gaussian"
SCHEDULE = "a schedule; teacher_temp is its value"
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

NO_COUNTERPART = {
  "clip_tokens": "clj has no tokenizer yet; it comes with CLIP",
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
  from clj import augment

  planar = lambda x: jnp.moveaxis(jnp.asarray(x, jnp.float32), -1, -3)
  image = planar(g["image"])
  factors = [g[f"{k}_factor"] for k in ("brightness", "contrast", "saturation")]
  delta, sigma, size = g["hue_delta"], g["blur_sigma"], g["blur_kernel_size"]
  bright, contrast, saturation = factors
  both = {
    "contrast": augment.contrast(image, contrast),
    "saturation": augment.saturation(image, saturation),
    "hue": augment.hue(image, delta),
    "grayscale": augment.grayscale(image),
    "blur": augment.gaussian_blur(image, sigma, size),
  }
  even = g["simclr_blur_even_kernel_size_input"]
  # The file holds the blurred impulse and not the impulse.
  height, width, _ = dict.__getitem__(g, "simclr_blur_of_delta").shape
  impulse = jnp.zeros((3, height, width)).at[:, height // 2, width // 2].set(1)
  images = {
    **{f"{name}_{k}": x for name in ("simclr", "byol") for k, x in both.items()},
    "simclr_brightness": augment.brightness(image, bright),
    "simclr_color_jitter_fixed_order": augment.color_jitter(image, (*factors, delta)),
    "simclr_blur_of_delta": augment.gaussian_blur(impulse, sigma, size),
    "simclr_blur_even": augment.gaussian_blur(image, sigma, even),
    "byol_brightness": augment.brightness_additive(image, g["byol_brightness_delta"]),
    "byol_hsv": augment.rgb_to_hsv(image),
    "byol_solarize_0p5": augment.solarize(image, 0.5),
  }
  return {name: jnp.moveaxis(x, -3, -1) for name, x in images.items()}


# The table against the directory.


def test_every_file_has_a_line(golden_dir):
  files = {os.path.splitext(f)[0] for f in os.listdir(golden_dir) if f != "README.md"}
  without = sorted(files - set(TABLE) - set(NO_COUNTERPART))
  assert not without, f"no line for {without}"
  gone = sorted((set(TABLE) | set(NO_COUNTERPART)) - files)
  assert not gone, f"lines without a file: {gone}"


@pytest.mark.parametrize("name", sorted(TABLE))
def test_golden(golden_dir, name):
  g = Golden(os.path.join(golden_dir, f"{name}.npz"))
  fn = TABLE[name]
  answer = fn(g, name) if fn is lars else fn(g)
  exempt = set(EXEMPT.get(name, ()))
  read = set(g.read)
  assert not read & set(answer), "an answer must not be read from the file"
  unanswered = set(g) - set(answer) - read - exempt
  assert not unanswered, f"neither read, answered nor exempt: {sorted(unanswered)}"
  assert set(answer) <= set(g), f"not in the file: {sorted(set(answer) - set(g))}"
  for key, value in answer.items():
    want, got = np.asarray(dict.__getitem__(g, key)), np.asarray(value, np.float64)
    assert got.shape == want.shape, f"{key}: {got.shape} in place of {want.shape}"
    limit = TOLERANCE * np.max(np.abs(want))
    worst = np.max(np.abs(got - want))
    assert worst <= limit, f"{key}: off by {worst:.2e}, {limit:.2e} allowed"


@pytest.mark.parametrize("name", sorted(NO_COUNTERPART))
def test_without_counterpart(golden_dir, name):
  pytest.skip(NO_COUNTERPART[name])
