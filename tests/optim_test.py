"""Optimisers against the official ones, their schedules, and masks by name."""

import os

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
def test_lars_is_the_official_one(name, golden_dir):
  golden = np.load(os.path.join(golden_dir, f"lars_{name}.npz"))
  slot, sign = SLOTS.get(name.split("_")[0], ("mu", 1))
  for step, params, momentum in lars_steps(golden, LARS[name]):
    for n in PARAMETERS:
      expected = golden[f"param_after{step}_{n}"]
      np.testing.assert_allclose(params[n], expected, atol=2e-6, rtol=2e-6)
      expected = sign * golden[f"{slot}_after{step}_{n}"]
      np.testing.assert_allclose(momentum[n], expected, atol=2e-6, rtol=2e-6)
