"""Five sketches through the one interface: what `Method` must be able to carry.

Each is a method of the field in a few lines, on linear towers: CLIP (two towers, a
learned scale), MoCo (a queue), BYOL (a teacher, updated after the optimiser), DINOv2
(crops of two sizes, masks, two centres, a frozen second teacher from other weights),
and queries with their passages, which have no picture at all (`text_pairs_method`).
None of them needs more of the train step than SimCLR does.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clj import sharding
from clj.interop import init_from
from clj.method import Aux, Method, keep
from clj.runs import log
from clj.train import TrainState, make_train_step
from tests import text_pairs_method

B, D = 16, 8


def unit(z):
  return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


def flat(x):
  return x.reshape(x.shape[0], -1)


def normal(rng, *shape):
  return 0.1 * jax.random.normal(rng, shape)


def cross_entropy(logits, targets):
  return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()


def clip():
  def init(rng, batch):
    del batch
    rng_image, rng_text = jax.random.split(rng)
    return {
      "image": normal(rng_image, 48, D),
      "text": normal(rng_text, 32, D),
      "log_scale": jnp.array(2.0, jnp.float32),
    }, {}

  def towers(params, batch):
    image = unit(flat(batch["image"]) @ params["image"])
    words = params["text"][batch["text"]] * batch["text_mask"][..., None]
    return image, unit(words.sum(1))

  def loss(params, extra, batch, rng, step):
    image, text = towers(params, batch)
    logits = jnp.exp(params["log_scale"]) * image @ text.T
    eye = jnp.eye(len(image))
    value = (cross_entropy(logits, eye) + cross_entropy(logits.T, eye)) / 2
    return value, (extra, Aux({"scale": jnp.exp(params["log_scale"])}, image))

  def embed(params, extra, batch):
    image, text = towers(params, batch)
    return {"features": image, "text": text}

  return Method(init, loss, keep, embed, ("image", "text", "text_mask"))


def moco(queue_size=32, momentum=0.9):
  def init(rng, batch):
    rng_query, rng_queue = jax.random.split(rng)
    query = normal(rng_query, 48, D)
    queue = unit(normal(rng_queue, queue_size, D))
    start = jnp.zeros((), jnp.int32)
    return {"query": query}, {"key": query + 0, "queue": queue, "start": start}

  def loss(params, extra, batch, rng, step):
    # The keys' encoder moves before it encodes, inside the step (MoCo v1, algorithm 1).
    key = jax.lax.stop_gradient(
      momentum * extra["key"] + (1 - momentum) * params["query"]
    )
    q = unit(flat(batch["image"][:, 0]) @ params["query"])
    k = jax.lax.stop_gradient(unit(flat(batch["image"][:, 1]) @ key))
    logits = jnp.concatenate([(q * k).sum(1, keepdims=True), q @ extra["queue"].T], 1)
    value = cross_entropy(logits / 0.2, jnp.eye(1, logits.shape[1]))
    queue = jax.lax.dynamic_update_slice(extra["queue"], k, (extra["start"], 0))
    start = (extra["start"] + len(k)) % queue_size
    return value, ({"key": key, "queue": queue, "start": start}, Aux({}, q))

  embed = lambda p, e, b: {"features": unit(flat(b["image"][:, 0]) @ p["query"])}
  return Method(init, loss, keep, embed)


def byol(momentum=0.9):
  def init(rng, batch):
    rng_online, rng_teacher, rng_predictor = jax.random.split(rng, 3)
    params = {
      "online": normal(rng_online, 48, D),
      "predictor": normal(rng_predictor, D, D),
    }
    return params, {"teacher": normal(rng_teacher, 48, D)}

  def loss(params, extra, batch, rng, step):
    x1, x2 = flat(batch["image"][:, 0]), flat(batch["image"][:, 1])
    predict = lambda x: unit(x @ params["online"] @ params["predictor"])
    target = lambda x: jax.lax.stop_gradient(unit(x @ extra["teacher"]))
    value = ((predict(x1) - target(x2)) ** 2).sum(1).mean()
    value += ((predict(x2) - target(x1)) ** 2).sum(1).mean()
    return value, (extra, Aux({}, x1 @ params["online"]))

  def post(params, extra, step):
    teacher = momentum * extra["teacher"] + (1 - momentum) * params["online"]
    return params, {"teacher": teacher}

  embed = lambda p, e, b: {"features": flat(b["image"][:, 0]) @ p["online"]}
  return Method(init, loss, post, embed)


def dinov2(prototypes=12, momentum=0.9):
  def tower(params, x):  # patches of 2 x 2 pixels -> class token and patch tokens
    *lead, H, W, C = x.shape
    patches = x.reshape(*lead, H // 2, 2, W // 2, 2, C).swapaxes(-4, -3)
    tokens = patches.reshape(*lead, -1, 4 * C) @ params["patch"]
    return tokens.mean(-2), tokens

  def init(rng, batch):
    rng_patch, rng_head, rng_patch_head = jax.random.split(rng, 3)
    params = {
      "patch": normal(rng_patch, 12, D),
      "mask_token": jnp.zeros((D,)),
      "head": normal(rng_head, D, prototypes),
      "patch_head": normal(rng_patch_head, D, prototypes),
    }
    copy = jax.tree.map(lambda x: x + 0, params)
    extra = {
      "teacher": copy,
      "gram_teacher": {"patch": normal(rng_patch, 12, D)},
      "center": jnp.zeros((1, prototypes)),
      "patch_center": jnp.zeros((1, prototypes)),
    }
    return params, extra

  def loss(params, extra, batch, rng, step):
    image, crops, mask = batch["image"], batch["crops"], batch["mask"]
    teacher_cls, teacher_patches = tower(extra["teacher"], image)
    sharpen = lambda logits, center: jax.nn.softmax((logits - center) / 0.04)
    cls_logits = teacher_cls @ extra["teacher"]["head"]
    patch_logits = teacher_patches @ extra["teacher"]["patch_head"]
    targets = jax.lax.stop_gradient(sharpen(cls_logits, extra["center"][None]))
    patch_targets = jax.lax.stop_gradient(
      sharpen(patch_logits, extra["patch_center"][None, None])
    )
    _, tokens = tower(params, image)
    tokens = jnp.where(mask[..., None], params["mask_token"][None, None, None], tokens)
    local_cls, _ = tower(params, crops)
    students = jnp.concatenate([tokens.mean(-2), local_cls], 1) @ params["head"]
    value = sum(
      cross_entropy(students[:, s] / 0.1, targets[:, t])
      for t in range(2)
      for s in range(students.shape[1])
      if s != t
    )
    picked = (
      patch_targets * jax.nn.log_softmax(tokens @ params["patch_head"] / 0.1)
    ).sum(-1)
    value -= (picked * mask).sum() / jnp.maximum(mask.sum(), 1)
    # Gram anchoring: patch similarities stay near those of the frozen second teacher.
    _, anchor = tower(
      {"patch": jax.lax.stop_gradient(extra["gram_teacher"]["patch"])}, image
    )
    gram = lambda t: unit(t + 1e-3) @ unit(t + 1e-3).swapaxes(-1, -2)
    value += ((gram(tokens) - gram(anchor)) ** 2).mean()
    follow = lambda old, new: (
      0.9 * old + 0.1 * new.reshape(-1, prototypes).mean(0)[None]
    )
    extra = extra | {
      "center": follow(extra["center"], cls_logits),
      "patch_center": follow(extra["patch_center"], patch_logits),
    }
    return value, (extra, Aux({}, tokens.mean((1, 2))))

  def post(params, extra, step):
    follow = lambda old, new: momentum * old + (1 - momentum) * new
    teacher = jax.tree.map(follow, extra["teacher"], params)
    return params, extra | {"teacher": teacher}

  def embed(params, extra, batch):
    return {"features": tower(extra["teacher"], batch["image"])[0][:, 0]}

  return Method(init, loss, post, embed, ("image", "crops", "mask"))


def text_pairs():
  return text_pairs_method.make({"vocab": 32}, total_steps=100)


SKETCHES = {
  "clip": clip,
  "moco": moco,
  "byol": byol,
  "dinov2": dinov2,
  "text_pairs": text_pairs,
}


def make_batch(name, seed):
  rng = np.random.default_rng(seed)
  if name == "text_pairs":
    tokens = rng.integers(0, 32, (B, 7)).astype(np.int32)
    mask = np.arange(7) < rng.integers(3, 8, (B, 1))
    query = {"query": tokens[:, :4], "query_mask": mask[:, :4]}
    return query | {"passage": tokens, "passage_mask": mask}
  views = {"clip": 1}.get(name, 2)
  batch = {"image": rng.uniform(size=(B, views, 4, 4, 3)).astype(np.float32)}
  if name == "clip":
    batch["text"] = rng.integers(0, 32, (B, 5)).astype(np.int32)
    batch["text_mask"] = np.ones((B, 5), bool)
  if name == "dinov2":
    batch["crops"] = rng.uniform(size=(B, 3, 2, 2, 3)).astype(np.float32)
    batch["mask"] = rng.uniform(size=(B, 2, 4)) < 0.3
  return batch


def run(name, devices, steps=3, change=lambda state: state):
  """Trains a sketch; returns (losses, final state, number of compilations)."""
  method, tx = SKETCHES[name](), optax.adam(0.01)
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  count = 0

  def counted(rng, batch):  # the augmentation of the step: called once per trace
    nonlocal count
    count += 1
    return batch

  with jax.set_mesh(mesh):

    def init(key):
      zeros = jax.tree.map(jnp.zeros_like, make_batch(name, 0))
      params, extra = method.init(key, zeros)
      return TrainState(jnp.zeros((), jnp.int32), key, params, extra, tx.init(params))

    shardings = sharding.state_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    state = change(jax.jit(init, out_shardings=shardings)(jax.random.key(0)))
    step = jax.jit(
      make_train_step(method, tx, counted),
      donate_argnums=0,
      out_shardings=(shardings, sharding.replicated(mesh)),
    )
    losses = []
    for i in range(steps):
      batch = sharding.to_global(make_batch(name, i), mesh)
      with jax.transfer_guard("disallow"):
        state, metrics = step(state, batch)
      assert bool(metrics["finite"])
      losses.append(float(metrics["loss"]))
  assert "total" in log.start_tables(mesh, state.params)
  return losses, jax.device_get(dataclasses.replace(state, rng=0)), count


@pytest.mark.parametrize("name", SKETCHES)
def test_sketch_is_the_same_on_one_and_on_eight_devices(name):
  losses, state, traced = run(name, 8)
  losses_one, state_one, _ = run(name, 1)
  assert traced == 1
  np.testing.assert_allclose(losses, losses_one, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(state_one), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  assert len(set(losses)) == 3


@pytest.mark.parametrize("name", SKETCHES)
def test_whole_and_part_of_a_batch_are_embedded(name):
  method, batch = SKETCHES[name](), make_batch(name, 0)
  assert set(method.needs) <= batch.keys()
  params, extra = jax.jit(method.init)(jax.random.key(0), batch)
  found = jax.jit(method.embed)(params, extra, batch)
  assert found and all(x.shape[0] == B for x in found.values())
  if name == "text_pairs":
    part = {key: batch[key] for key in ("query", "query_mask")}
    alone = jax.jit(method.embed)(params, extra, part)
    assert found.keys() == {"query", "passage"} and alone.keys() == {"query"}
    np.testing.assert_allclose(alone["query"], found["query"], atol=1e-6)


def test_text_pairs_find_each_other():
  method, tx = text_pairs(), optax.adam(0.05)
  params, extra = method.init(jax.random.key(0), make_batch("text_pairs", 0))
  state = TrainState(jnp.int32(0), jax.random.key(1), params, extra, tx.init(params))
  step = jax.jit(make_train_step(method, tx, lambda rng, batch: batch))
  for i in range(30):
    state, _ = step(state, make_batch("text_pairs", i))
  z = method.embed(state.params, state.extra, make_batch("text_pairs", 99))
  found = (z["query"] @ z["passage"].T).argmax(1)
  assert np.mean(found == np.arange(B)) > 0.8
  start = method.embed(params, extra, make_batch("text_pairs", 99))
  assert not np.allclose(start["query"], z["query"])


def test_views_and_method_share_no_random_number():
  """Though the method splits its key, and the views those of theirs."""
  drawn = lambda rng: jax.random.normal(jax.random.split(rng)[0], (3,))

  def augment(rng, batch):
    return batch | {"drawn": jnp.stack([jax.random.normal(rng, (3,)), drawn(rng)])}

  def loss(params, extra, batch, rng, step):
    mine = jnp.stack([jax.random.normal(rng, (3,)), drawn(rng)])
    apart = jnp.abs(mine[:, None] - batch["drawn"][None]).min()
    return (params["w"] ** 2).sum(), (extra, Aux({"apart": apart}, batch["image"]))

  method, tx = Method(None, loss, keep, None), optax.sgd(0.1)
  params = {"w": jnp.ones((2,))}
  state = TrainState(jnp.int32(0), jax.random.key(0), params, {}, tx.init(params))
  step = jax.jit(make_train_step(method, tx, augment))
  _, metrics = step(state, {"image": jnp.zeros((B, 4))})
  assert metrics["apart"] > 1e-4


def test_moco_queue_is_first_in_first_out():
  _, one, _ = run("moco", 8, steps=1)
  _, three, _ = run("moco", 8, steps=3)
  assert one.extra["start"] == 16 and three.extra["start"] == 16
  # The queue holds 32 keys, two batches: the third replaced the first.
  assert not np.allclose(one.extra["queue"][:16], three.extra["queue"][:16])


def test_byol_teacher_follows_after_the_optimiser():
  start = {}

  def remember(state):
    start["teacher"] = np.asarray(state.extra["teacher"])
    return state

  _, state, _ = run("byol", 8, steps=1, change=remember)
  expected = 0.9 * start["teacher"] + 0.1 * state.params["online"]
  np.testing.assert_allclose(state.extra["teacher"], expected, rtol=1e-5, atol=1e-7)


def test_dinov2_frozen_teacher_comes_from_other_weights(tmp_path):
  from safetensors.numpy import save_file

  weights = np.random.default_rng(1).normal(size=(12, D)).astype(np.float32)
  save_file({"backbone.patch": weights}, tmp_path / "gram.safetensors")
  rename = ((r"^backbone\.patch$", "extra/gram_teacher/patch"),)
  reports = []

  def change(state):
    params, extra, report = init_from.init_from(
      state.params, state.extra, tmp_path / "gram.safetensors", rename
    )
    reports.append(report)
    return dataclasses.replace(state, params=params, extra=extra)

  _, state, traced = run("dinov2", 8, change=change)
  np.testing.assert_array_equal(state.extra["gram_teacher"]["patch"], weights)
  assert traced == 1
  assert "1 of 11 arrays taken" in reports[0]
  assert "kept fresh (10)" in reports[0]
