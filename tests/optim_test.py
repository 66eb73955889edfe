"""Optimisers against the official ones, their schedules, and masks by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clj import optim

PARAMETERS = ("w1", "b1", "w2", "gamma", "w0")
SLOTS = {"simclr": ("momentum", 1), "optax": ("trace", -1)}

LARS = {
  "simclr": {"form": "inside"},
  "simclr_nesterov": {"form": "inside", "nesterov": True},
  "simclr_popular": {"form": "popular"},
  "simclr_varlr": {"form": "inside"},
  "optax": {"form": "inside"},
  "optax_nesterov": {"form": "inside", "nesterov": True},
  "optax_nomask": {"form": "inside", "no_decay": "", "no_adaptation": ""},
  "optax_varlr": {"form": "inside"},
  "barlow": {"form": "outside"},
  "barlow_nofilter": {"form": "outside", "no_decay": "", "no_adaptation": ""},
  "barlow_varlr": {"form": "outside"},
  "byol": {"form": "outside"},
  "mocov3": {"form": "outside"},
  "vicreg": {"form": "outside"},
}


def lars_steps(golden, options):
  """Parameters and momentum after each of the steps that the file has gradients for."""
  excluded = r"(^|/)(b1|gamma)$"
  options = {"no_decay": excluded, "no_adaptation": excluded, **options}
  rates = jnp.asarray(golden["lr_per_step"])
  tx = optim.lars(
    lambda step: rates[step],
    momentum=float(golden["momentum"]),
    weight_decay=float(golden["weight_decay"]),
    trust_coefficient=float(golden["eta"]),
    **options,
  )
  params = {n: jnp.asarray(golden[f"param_{n}"]) for n in PARAMETERS}
  state = tx.init(params)
  for step in range(1, len(rates) + 1):
    grads = {n: jnp.asarray(golden[f"gradient_step{step}_{n}"]) for n in PARAMETERS}
    updates, state = tx.update(grads, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    yield step, params, state.momentum


@pytest.mark.parametrize("name", LARS)
def test_lars_is_the_official_one(name, golden_file):
  golden = np.load(golden_file(f"lars_{name}.npz"))
  slot, sign = SLOTS.get(name.split("_")[0], ("mu", 1))
  for step, params, momentum in lars_steps(golden, LARS[name]):
    for n in PARAMETERS:
      expected = golden[f"param_after{step}_{n}"]
      np.testing.assert_allclose(params[n], expected, atol=2e-6, rtol=2e-6)
      expected = sign * golden[f"{slot}_after{step}_{n}"]
      np.testing.assert_allclose(momentum[n], expected, atol=2e-6, rtol=2e-6)


PARAMS = {
  "encoder": {
    "conv": {"kernel": jnp.ones((3, 4))},
    "bn": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
  },
  "projector": {"dense_0": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}},
  "probe": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
}


def build(name, **options):
  defaults = {"total_steps": 10, "batch_size": 256, "learning_rate": 0.5}
  return optim.make(name=name, **{**defaults, **options})


def moved(tx, grads):
  """Names of the parameters that one update with these gradients moves."""
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
  pairs = zip(
    jax.tree.leaves(optim.names(PARAMS)), jax.tree.leaves(updates), strict=True
  )
  return [name for name, update in pairs if np.any(update)]


@pytest.mark.parametrize(
  ("name", "decayed"),
  [
    ("sgd", ["encoder/bn/bias", "encoder/bn/scale", "encoder/conv/kernel",
             "projector/dense_0/bias", "projector/dense_0/kernel"]),
    ("adamw", ["encoder/conv/kernel", "projector/dense_0/kernel"]),
    ("lars", ["encoder/conv/kernel", "projector/dense_0/kernel"]),
  ],
)  # fmt: skip
def test_what_is_decayed(name, decayed):
  """Only decay moves a parameter whose gradient is 0; the probe never is."""
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  assert moved(build(name, weight_decay=0.1)[0], zeros) == decayed
  if name != "sgd":
    everything = build(name, weight_decay=0.1, no_decay="")[0]
    assert len(moved(everything, zeros)) == 5


def test_what_lars_adapts():
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  tx, _ = build("lars", learning_rate=1.0)
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
  steps = [float(-u.ravel()[0]) for u in jax.tree.leaves(updates)]
  # In the order of the names: encoder bias, scale, kernel; probe; projector.
  np.testing.assert_allclose(steps, [1, 1, 1e-3, 0.1, 0.1, 1, 1e-3], rtol=1e-5)


@pytest.mark.parametrize("name", optim.OPTIMISERS)
def test_frozen_parameters_have_no_state_and_groups_their_own_rates(name):
  tx, _ = build(
    name, frozen="^encoder/", groups=[("dense_0/kernel", {"multiplier": 0.25})]
  )
  state = jax.jit(tx.init)(PARAMS)
  leaves = jax.tree.leaves_with_path(state)
  assert all("encoder" not in jax.tree_util.keystr(path) for path, _ in leaves)
  assert not any(leaf.weak_type for _, leaf in leaves)
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  updates, after = tx.update(grads, state, PARAMS)
  shapes = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(after)]
  assert shapes == [(x.shape, x.dtype, x.weak_type) for _, x in leaves]
  assert not any(np.any(u) for u in jax.tree.leaves(updates["encoder"]))
  plain, _ = build(name)
  whole, _ = plain.update(grads, plain.init(PARAMS), PARAMS)
  quarter = 0.25 * whole["projector"]["dense_0"]["kernel"]
  np.testing.assert_allclose(updates["projector"]["dense_0"]["kernel"], quarter)
  np.testing.assert_allclose(updates["probe"]["bias"], -0.1, rtol=1e-6)


def test_the_probe_is_not_in_the_clipped_norm():
  tx, _ = build("sgd", clip_norm=1.0, momentum=0.0)
  grads = jax.tree.map(jnp.zeros_like, PARAMS)
  grads["projector"]["dense_0"]["bias"] = jnp.array([3.0, 4.0])
  grads["probe"]["kernel"] = jnp.full((4, 2), 1e6)
  updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
  found = updates["projector"]["dense_0"]["bias"]
  np.testing.assert_allclose(found, [-0.3, -0.4], rtol=1e-6)


def test_schedule_and_scaling():
  _, schedules = build(
    "sgd", total_steps=12, warmup_steps=2, floor=0.1, weight_decay=0.3
  )
  rate = [float(schedules["learning_rate"](step)) for step in (0, 1, 2, 7, 12, 20)]
  np.testing.assert_allclose(rate, [0, 0.25, 0.5, 0.275, 0.05, 0.05], rtol=1e-6)
  assert float(schedules["weight_decay"](5)) == pytest.approx(0.3)
  for scaling, base, expected in (("linear", 0.3, 4.8), ("sqrt", 0.075, 4.8)):
    _, schedules = build("lars", batch_size=4096, learning_rate=base, scaling=scaling)
    assert float(schedules["learning_rate"](0)) == pytest.approx(expected)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"name": "adam"}, "optimiser 'adam': use one of sgd, adamw, lars"),
    ({"name": "adamw", "nesterov": True}, "adamw has no option 'nesterov'"),
    ({"name": "lars", "form": "both"}, "form='both'"),
    ({"name": "sgd", "scaling": "cubic"}, "scaling='cubic'"),
    ({"name": "sgd", "warmup_steps": 11}, "11 steps in total_steps=10"),
    ({"name": "sgd", "frozen": "^encodr/"}, "matches '\\^encodr/'"),
    ({"name": "sgd", "groups": [("bias", {"rate": 1})]}, "group 'bias'"),
  ],
)
def test_errors_name_the_value(options, message):
  with pytest.raises(ValueError, match=message):
    build(**options)[0].init(PARAMS)
