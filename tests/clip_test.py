"""CLIP's options, and what is made of CLIP: SLIP, distillation, averaged weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clj import losses, sharding, train
from clj.interop import init_from
from clj.methods import make_method
from clj.methods.ids import text_ids

B, L = 16, 8


def start_from(state, *arguments):
  """`init_from` on a state; returns (state, report)."""
  params, extra, report = init_from.init_from(state.params, state.extra, *arguments)
  return dataclasses.replace(state, params=params, extra=extra), report


IMAGE = {"name": "vit_test", "depth": 1}
TEXT = {"name": "text_test", "depth": 1, "vocab": 40}


def make(**options):
  model = {"image": options.pop("image", IMAGE), "text": TEXT}
  return make_method({"name": "clip", "width": 12} | options, model, 100)


def started(method, seed=0, **options):
  return jax.jit(method.init)(jax.random.key(seed), batch(**options))


def batch(seed=0, rows=B, crops=False):
  rng = np.random.default_rng(seed)
  length = rng.integers(2, L, rows)
  given = {
    "image": rng.random((rows, 1, 16, 16, 3), np.float32),
    "text": rng.integers(1, 40, (rows, L)).astype(np.int32),
    "text_mask": np.arange(L) < length[:, None],
    "label": rng.integers(0, 3, rows).astype(np.int32),
  }
  if crops:
    given["crops"] = rng.random((rows, 2, 16, 16, 3), np.float32)
  return {key: jnp.asarray(value) for key, value in given.items()}


def loss_of(method, params, extra, given):
  return jax.jit(method.loss)(params, extra, given, jax.random.key(2), jnp.int32(0))


def embed(method, params, extra, given):
  return jax.jit(method.embed)(params, extra, given)


def trained(method, steps, *, devices=1, optim=None, crops=False, state=None):
  """Losses of free-running steps, and the last state."""
  optim = {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.1} | (optim or {})
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  frozen = method.locked or ""
  tx, _ = train.optimisers.make(total_steps=100, batch_size=B, frozen=frozen, **optim)
  step = jax.jit(train.make_train_step(method, tx, lambda rng, batch: batch))
  with jax.set_mesh(mesh):
    if state is None:
      params, extra = started(method, crops=crops)
      key = jax.random.key(1)
      state = train.TrainState(jnp.int32(0), key, params, extra, tx.init(params))
    values = []
    for i in range(steps):
      given = sharding.to_global(batch(i, crops=crops), mesh)
      state, metrics = step(state, given)
      values.append(float(metrics["loss"]))
  return values, state


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_micro_batches_change_nothing(loss):
  whole, _ = trained(make(loss=loss), 15)
  parts, _ = trained(make(loss=loss, micro_batch=4), 15, devices=2)
  np.testing.assert_allclose(parts, whole, rtol=1e-4)
  assert np.ptp(whole) > 0.05


def test_batch_norm_cannot_be_exact_in_micro_batches():
  method = make(image={"name": "resnet_test"}, micro_batch=4)
  with pytest.raises(ValueError, match="image tower has batch norm"):
    method.init(jax.random.key(0), batch())
  method = make(image={"name": "resnet_test"}, micro_batch=4, locked="^image/")
  values, _ = trained(method, 2)
  assert np.isfinite(values).all()


def distance(a, b):
  return max(float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b))))


@pytest.mark.parametrize("image", ["vit_test", "resnet_test"])
def test_a_locked_tower_does_not_move(image):
  """Neither by decay nor by statistics, though the optimiser decays all else."""
  method = make(image={"name": image}, locked="^image/")
  _, before = trained(method, 0)
  _, after = trained(method, 3, state=before)
  assert distance(before.params["image"], after.params["image"]) == 0
  assert jax.tree.all(
    jax.tree.map(jnp.array_equal, before.extra["image"], after.extra["image"])
  )
  for name in ("text", "text_head", "image_head"):
    assert distance(before.params[name], after.params[name]) > 0


def test_a_part_of_a_tower_is_locked():
  method = make(
    image={"name": "vit_test"}, locked="^image/(patch|position|encoder/block0)"
  )
  _, before = trained(method, 0)
  _, after = trained(method, 2, state=before)
  moved = {
    sharding.name(path)
    for (path, old), new in zip(
      jax.tree_util.tree_leaves_with_path(before.params),
      jax.tree.leaves(after.params),
      strict=True,
    )
    if not jnp.array_equal(old, new)
  }
  assert "image/encoder/block1/mlp/fc1/kernel" in moved
  assert not any(name.startswith(("image/patch", "image/position")) for name in moved)
  assert not any("image/encoder/block0" in name for name in moved)


def test_no_gradient_is_computed_for_a_locked_tower():
  """Its forward pass is all that is left of the work of a tower that is nearly all."""

  def flops(locked):
    method = make(image=IMAGE | {"width": 128}, locked=locked)
    given, rng = batch(), jax.random.key(0)
    params, extra = jax.eval_shape(method.init, rng, given)
    grad = jax.jit(jax.grad(method.loss, has_aux=True))
    compiled = grad.lower(params, extra, given, rng, jnp.int32(0)).compile()
    return compiled.cost_analysis()["flops"]

  assert flops("^image/") < 0.45 * flops("")


def test_equal_captions_are_no_negatives():
  given = batch()
  rows = jnp.arange(B) // 2 * 2  # every caption twice
  twice = given | {key: given[key][rows] for key in ("text", "text_mask")}
  # What stands behind a caption's end does not matter.
  noise = jnp.where(jnp.arange(B)[:, None] % 2 == 0, 0, 7)
  twice["text"] = jnp.where(twice["text_mask"], twice["text"], noise)
  ids = np.asarray(text_ids(twice["text"], twice["text_mask"]))
  np.testing.assert_array_equal(ids[::2], ids[1::2])
  assert len(set(ids.tolist())) == B // 2
  for loss in ("softmax", "sigmoid"):
    method, plain = make(loss=loss), make(loss=loss, mask_duplicates=False)
    params, extra = started(method)
    z = embed(method, params, extra, twice)
    x, y = (losses.l2_normalize(z[key]) for key in ("image", "text"))
    scale, bias = jnp.exp(params["log_scale"]), params.get("bias")
    more = () if loss == "softmax" else (bias,)
    named = losses.clip if loss == "softmax" else losses.siglip
    for m, expected in (
      (method, named(x, y, scale, *more, ids=jnp.arange(B) // 2)),
      (plain, named(x, y, scale, *more)),
    ):
      value, _ = loss_of(m, params, extra, twice)
      np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_ids_of_texts_are_a_good_hash():
  """Of 100,000 captions that differ in one token, about one pair in 2^32 collides."""
  number = np.arange(100_000)
  text = np.full((100_000, 6), 3, np.int32)
  text[:, 2], text[:, 4] = number % 317, number // 317
  mask = np.ones(text.shape, bool)
  ids = np.asarray(text_ids(text, mask)).astype(np.int64)
  assert len(np.unique(ids)) >= 100_000 - 8  # 1.2 expected
  for bit in range(32):
    assert 0.49 < ((ids >> bit) & 1).mean() < 0.51
  swapped = text_ids(np.array([[1, 2, 3], [2, 1, 3]]), np.ones((2, 3), bool))
  assert swapped[0] != swapped[1]


def test_the_scale_stays_in_its_limits():
  for limit, expected in ((100.0, np.log(100)), (None, 7.0)):
    method = make(max_scale=limit)
    params, extra = started(method)
    params["log_scale"] = jnp.float32(7)
    params, _ = method.post(params, extra, 0)
    np.testing.assert_allclose(params["log_scale"], expected, rtol=1e-6)


TEACHER = {
  "model": {"image": IMAGE | {"width": 24}, "text": TEXT},
  "width": 20,
}


@pytest.mark.slow
def test_a_teacher_is_filled_by_init_from_and_imitated(tmp_path):
  from safetensors.numpy import save_file

  teacher = make(image=TEACHER["model"]["image"], width=TEACHER["width"])
  weights, stats = started(teacher, seed=5)
  weights["log_scale"] = jnp.float32(3)
  flat = {
    sharding.name(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights)
  }
  save_file(flat, tmp_path / "teacher.safetensors")
  method = make(name="clip_distill", teacher=TEACHER, weight=2.0)
  _, state = trained(method, 0)
  rename = (("^(.*)", r"extra/teacher/params/\1"),)
  state, report = start_from(state, tmp_path / "teacher.safetensors", rename)
  assert f"{len(flat)} of " in report and "refused" not in report
  assert "params/image/patch/kernel" in report  # kept fresh
  given, rng = batch(3), jax.random.key(2)
  value, (extra, aux) = method.loss(state.params, state.extra, given, rng, 0)
  z, t = (
    method.embed(state.params, state.extra, given),
    teacher.embed(weights, {**state.extra}, given),
  )
  unit = losses.l2_normalize
  scale = jnp.exp(state.params["log_scale"])
  student = unit(z["image"]), unit(z["text"])
  expected = losses.clip_distill(
    *student, unit(t["image"]), unit(t["text"]), scale, jnp.exp(3.0)
  )
  np.testing.assert_allclose(aux.metrics["distill"], expected, rtol=1e-5)
  expected = losses.clip(*student, scale) + 2 * expected
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert distance(extra["teacher"], state.extra["teacher"]) == 0
  parts = make(name="clip_distill", teacher=TEACHER, weight=2.0, micro_batch=4)
  again, _ = loss_of(parts, state.params, state.extra, given)
  np.testing.assert_allclose(again, value, rtol=1e-5)


SLIP = {
  "name": "slip",
  "weight": 0.5,
  "temperature": 0.1,
  "projector": {"widths": (24, 8), "norm": False, "last_norm": False, "std": None},
}


def test_slip_adds_nt_xent_between_two_more_views():
  method = make(**SLIP)
  assert "crops" in method.needs
  given = batch(crops=True)
  with pytest.raises(ValueError, match="slip compares two views, and `crops` has 1"):
    method.init(jax.random.key(0), given | {"crops": given["crops"][:, :1]})
  params, extra = started(method, crops=True)
  value, (_, aux) = loss_of(method, params, extra, given)

  def project(view):
    image = given["crops"][:, view : view + 1]
    h = embed(method, params, extra, {"image": image})
    dense = params["projector"]
    hidden = jax.nn.relu(h["features"] @ dense["dense1"]["kernel"])
    return hidden @ dense["dense2"]["kernel"]

  expected = losses.nt_xent(project(0), project(1), 0.1)
  np.testing.assert_allclose(aux.metrics["slip"], expected, rtol=1e-4)
  np.testing.assert_allclose(
    value, aux.metrics["contrastive"] + 0.5 * expected, rtol=1e-4
  )
  parts, _ = loss_of(make(**SLIP, micro_batch=4), params, extra, given)
  np.testing.assert_allclose(parts, value, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, SLIP, {"probe_classes": 3}])
def test_averaged_weights_lie_between_the_old_and_the_new(options):
  """Whatever the method is, and with a probe around it."""
  crops = "projector" in options
  method, plain = make(wise_ft=0.25, **options), make(**options)
  _, before = trained(method, 0, crops=crops)
  start = {k: v for k, v in before.params.items() if k != "probe"}
  assert distance(before.extra["start"], start) == 0
  _, state = trained(method, 3, state=before, crops=crops)
  assert distance(state.extra["start"], start) == 0
  assert distance(state.params, before.params) > 0
  mixed = jax.tree.map(
    lambda old, new: 0.75 * old + 0.25 * new, before.params, state.params
  )
  given = batch(9)
  found = embed(method, state.params, state.extra, given)
  assert len(found) == 6
  for weights, prefix in ((mixed, ""), (state.params, "trained_")):
    expected = embed(plain, weights, state.extra, given)
    for key in ("image", "text", "features"):
      np.testing.assert_allclose(found[prefix + key], expected[key], atol=1e-5)


def test_averaging_trains_as_the_method_alone_does():
  averaged, _ = trained(make(wise_ft=0.25), 3)
  alone, _ = trained(make(), 3)
  assert averaged == alone


@pytest.mark.parametrize("keys", [("image",), ("text", "text_mask"), ("label",)])
def test_any_subset_of_a_batch_is_embedded(keys):
  method, given = make(wise_ft=0.5), batch()
  params, extra = started(method)
  whole = embed(method, params, extra, given)
  found = embed(method, params, extra, {key: given[key] for key in keys})
  names = {"image": {"image", "features"}, "text": {"text"}, "label": set()}[keys[0]]
  assert found.keys() == names | {f"trained_{name}" for name in names}
  for name in found:
    np.testing.assert_allclose(found[name], whole[name], atol=1e-6)


def test_towers_have_learning_rates_of_their_own():
  optim = {"groups": (("^image/", {"multiplier": 0.0}),), "weight_decay": 0.0}
  _, before = trained(make(), 0, optim=optim)
  _, after = trained(make(), 2, optim=optim, state=before)
  assert distance(before.params["image"], after.params["image"]) == 0
  assert distance(before.params["text"], after.params["text"]) > 0


def test_mistakes_are_named_in_a_line():
  for options, line in (
    ({"loss": "hinge"}, "method.loss is 'hinge'"),
    ({"image_head": "mlp"}, "method.image_head is 'mlp'"),
    ({"wise_ft": 2.0}, "method.wise_ft is 2.0"),
    ({"average": 0.5}, "no key 'average' in method; it is method.wise_ft now"),
    ({"slip": None}, "no key 'slip' in method; it is method.name='slip' now"),
    ({"total_steps": 5}, "no key 'total_steps' in method; it stands beside it"),
    (SLIP | {"wieght": 1}, "no key 'wieght' in method; did you mean 'weight'"),
    (
      {"name": "clip_distill", "teacher": TEACHER | {"hidth": 1}},
      "no key 'hidth' in method.teacher; did you mean 'width'",
    ),
  ):
    with pytest.raises(ValueError, match=line):
      make(**options)
  with pytest.raises(ValueError, match="features are 16 wide and method.width is 12"):
    make(image_head="none").init(jax.random.key(0), batch())
