"""Every method, by its own smoke recipe: a line in METHODS is all a new one needs."""

import dataclasses
import functools
import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clj import models, optim, sharding, train
from clj.data import open_data
from clj.methods import METHODS, make_method

# Tokens of a transformer that all examples share: of one axis, and no norm or bias.
TOKENS = r"(^|/)(cls|mask|position|cls_position|mean_position|map/probe)$"
# Those made of another method's pieces run in the slow tier.
BUILT = {"slip", "clip_distill"}
EVERY = [pytest.param(n, marks=pytest.mark.slow) if n in BUILT else n for n in METHODS]
GOLDEN = pathlib.Path(__file__).parent / "golden_steps.json"


def smoke(name):
  config = importlib.import_module(f"configs.{name}").get_config("smoke").to_dict()
  if "dtype" in config["model"]:
    config["model"]["dtype"] = "float32"
  return config


@functools.cache
def program(name, devices):
  """The smoke recipe on some devices, compiled once for all tests."""
  config = smoke(name)
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  batch = train.batch_shapes(opened(name), config["batch_size"], mesh)
  keys = ("seed", "batch_size", "method", "model", "optim")
  with jax.set_mesh(mesh):
    made = train.build(
      batch,
      mesh,
      total_steps=40,
      augment=config["data"]["augment"],
      **{k: config[k] for k in keys},
    )

    def examine(state, batch):
      """Loss, gradient and next `extra` of a step, without its update."""
      rng = jax.random.fold_in(state.rng, state.step)
      views = made.augment(jax.random.fold_in(rng, 0), batch)
      grad_fn = jax.value_and_grad(made.method.loss, has_aux=True)
      (loss, (extra, _)), grads = grad_fn(
        state.params, state.extra, views, jax.random.fold_in(rng, 1), state.step
      )
      return loss, grads, extra

    out = sharding.replicated(mesh)
    return mesh, made, jax.jit(examine, out_shardings=out)


@functools.cache
def opened(name):
  return open_data(smoke(name)["data"])


def batches(name, step):
  config = smoke(name)
  return next(
    opened(name).batches(
      seed=config["seed"], batch_size=config["batch_size"], step=step
    )
  )


@functools.cache
def run(name, devices, steps):
  """Trains freely; returns (losses, states on the host at steps 0, 5, 10, 20)."""
  mesh, made, _ = program(name, devices)
  losses, states = [], {}
  with jax.set_mesh(mesh):
    state = made.init(jax.random.key(smoke(name)["seed"]))
    for step in range(steps + 1):
      if step in (0, 5, 10, 20):
        states[step] = to_host(state)
      if step == steps:
        break
      batch = sharding.to_global(batches(name, step), mesh)
      with jax.transfer_guard("disallow"):
        state, metrics = made.step(state, batch)
      losses.append(float(metrics["loss"]))
  return losses, states


def to_host(state):
  key = jax.random.key_data(state.rng)
  return jax.tree.map(np.array, dataclasses.replace(state, rng=key))


def to_devices(state, made):
  state = dataclasses.replace(state, rng=jax.random.wrap_key_data(state.rng))
  return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, made.state)


def norm(tree):
  return np.sqrt(
    sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree))
  )


def distance(a, b):
  return norm(jax.tree.map(lambda x, y: np.float64(x) - np.float64(y), a, b))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_five_free_steps_are_the_same_on_one_and_eight_devices(name):
  one, _ = run(name, 1, 5)
  eight, _ = run(name, 8, 20)
  np.testing.assert_allclose(one, eight[:5], rtol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_same_state_gives_same_step_on_1_2_and_8_devices(name):
  _, states = run(name, 8, 20)
  for step, state in states.items():
    results = {}
    for devices in (1, 2, 8):
      mesh, made, examine = program(name, devices)
      with jax.set_mesh(mesh):
        batch = sharding.to_global(batches(name, step), mesh)
        results[devices] = jax.device_get(examine(to_devices(state, made), batch))
    loss, grads, extra = results[1]
    for other in (2, 8):
      other_loss, other_grads, other_extra = results[other]
      assert abs(other_loss - loss) <= 1e-6 * max(1, abs(loss)), (step, other)
      assert distance(other_grads, grads) <= 1e-5 * norm(grads), (step, other)
      assert distance(other_extra, extra) <= 1e-5 * max(1, norm(extra)), (step, other)


@pytest.mark.parametrize("name", EVERY)
def test_golden_steps(name):
  golden = json.loads(GOLDEN.read_text())
  losses, _ = run(name, 8, 20)
  np.testing.assert_allclose(
    losses[:3],
    golden.get(name, []),
    rtol=1e-3,
    err_msg=(
      f"The first losses of configs/{name}.py:smoke have changed. If a change of the "
      f"recipe, of the data or of the initialisation explains it, put the new ones "
      f"into {GOLDEN.name}; if nothing should have changed them, something is broken."
    ),
  )


@pytest.mark.parametrize("name", EVERY)
def test_loss_keeps_the_structure_of_extra(name):
  _, made, _ = program(name, 8)
  batch = jax.eval_shape(made.augment, jax.random.key(0), batches(name, 0))
  state = made.state
  _, (extra, aux) = jax.eval_shape(
    made.method.loss, state.params, state.extra, batch, state.rng, state.step
  )
  describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert describe(extra) == describe(state.extra)
  assert aux.features.shape[0] == len(batch["image"]) and aux.features.ndim == 2
  assert all(v.shape == () for v in aux.metrics.values())
  assert not any(x.weak_type for x in jax.tree.leaves((state.params, state.extra)))
  assert jax.eval_shape(made.method.embed, state.params, state.extra, {}) == {}


@pytest.mark.parametrize("name", [*EVERY, "lit"])
def test_gradient_flows_into_every_parameter_but_the_locked(name):
  _, states = run(name, 8, 20)
  mesh, made, examine = program(name, 8)
  with jax.set_mesh(mesh):
    batch = sharding.to_global(batches(name, 5), mesh)
    _, grads, _ = examine(to_devices(states[5], made), batch)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    leaf_name = sharding.name(path)
    locked = optim.matches(made.method.locked, leaf_name)
    assert np.any(np.asarray(grad) != 0) != locked, leaf_name


@pytest.mark.parametrize("name", EVERY)
def test_features_do_not_collapse(name):
  _, states = run(name, 8, 20)
  mesh, made, _ = program(name, 8)
  with jax.set_mesh(mesh):
    state = to_devices(states[20], made)
    pictures = np.concatenate([batches(name, s)["image"] for s in range(4)])
    batch = {"image": pictures[:, None] / np.float32(255)}
    features = made.method.embed(state.params, state.extra, batch)["features"]
  unit = features / jnp.linalg.norm(features, axis=1, keepdims=True)
  assert float(jnp.mean(jnp.std(unit, axis=0))) * np.sqrt(unit.shape[1]) > 0.1


@pytest.mark.parametrize("name", EVERY)
def test_probe_learns_and_changes_nothing_else(name):
  config = smoke(name)
  plain = make_method(config["method"], config["model"], 10)
  probed = make_method(config["method"] | {"probe_classes": 9}, config["model"], 10)
  assert "label" in probed.needs
  _, made, _ = program(name, 1)
  batch = made.augment(jax.random.key(0), jax.tree.map(jnp.asarray, batches(name, 0)))
  params, extra = plain.init(jax.random.key(1), batch)
  probed_params, probed_extra = probed.init(jax.random.key(1), batch)
  step, rng = jnp.int32(0), jax.random.key(2)

  def gradient(method, params, extra):
    grad_fn = jax.value_and_grad(method.loss, has_aux=True)
    return grad_fn(params, extra, batch, rng, step)

  @jax.jit  # both in one program: compiling takes the time
  def both():
    return (
      gradient(plain, params, extra),
      gradient(probed, probed_params, probed_extra),
    )

  ((loss, (_, aux)), grads), ((probed_loss, (_, probed_aux)), probed_grads) = both()
  probe = probed_grads.pop("probe")
  assert float(jnp.abs(probe["kernel"]).max()) > 0
  assert distance(probed_grads, grads) <= 1e-5 * norm(grads)
  np.testing.assert_allclose(
    probed_loss, loss + probed_aux.metrics["probe/loss"], rtol=1e-5
  )
  assert "probe/accuracy" not in aux.metrics


def unknown_names(params):
  """Of parameters of one axis that the optimisers would decay and adapt."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = sharding.name(path)
    if leaf.ndim == 1 and not optim.matches(f"{optim.NORM_AND_BIAS}|{TOKENS}", name):
      yield name


@pytest.mark.parametrize("name", EVERY)
def test_names_of_parameters_are_known_to_the_optimiser(name):
  """Norms and biases are named so that the masks find them."""
  _, made, _ = program(name, 8)
  assert not list(unknown_names(made.state.params))


@pytest.mark.parametrize("pool", ["cls", "map"])
def test_names_of_a_transformers_parameters_are_known(pool):
  network = models.image("vit_test", mask_token=True, registers=2, pool=pool)
  image = jnp.zeros((1, 16, 16, 3))
  params, _ = jax.eval_shape(network.init, jax.random.key(0), image)
  assert "mask" in params
  assert not list(unknown_names(params))
  assert list(unknown_names({"tower": {"weight": params["mask"]}})) == ["tower/weight"]
