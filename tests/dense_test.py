"""The CPU's forms of transformers against flax's own, and where they are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from clj import models, sharding
from clj.models import attention, dense
from clj.models.transformer import ACTIVATIONS

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(4, 32, 32, 3)).astype(np.float32)
TEXTS = RNG.integers(1, 1000, (4, 7)).astype(np.int32)
MASK = np.arange(7)[None] < np.array([[7], [3], [5], [1]])

TOWERS = {
  "image": (models.image, "vit_test", {"pool": "map"}),
  "scan": (models.image, "vit_test", {"scan": True, "layer_scale": 0.5}),
  "remat": (models.image, "vit_test", {"scan": True, "remat": "dots"}),
  "gelu_tanh": (models.image, "vit_test", {"activation": "gelu_tanh", "remat": True}),
  "text": (models.text, "text_test", {}),
  "causal": (models.text, "text_test", {"causal": True, "activation": "quick_gelu"}),
}


@pytest.fixture
def flax(monkeypatch):
  """Runs a function without the forms for CPUs."""

  def run(function, *args):
    with monkeypatch.context() as patched:
      patched.setattr(dense, "on_cpu", lambda dtype: False)
      return function(*args)

  return run


def normal(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def close(found, expected, tolerance):
  """Equal up to a part of the largest element, array by array."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    assert a.dtype == b.dtype and a.shape == b.shape
    bound = tolerance * max(float(np.abs(b).max()), 1e-30)
    np.testing.assert_allclose(a, b, rtol=0, atol=bound)


def pulled(function):
  """Value and gradients, each element with a weight of its own."""

  def run(*args):
    y, back = jax.vjp(function, *args)
    return y, *back(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

  return run


def attend(q, k, v, masked=False, causal=False):
  mask = jnp.asarray([[True, False, True, True, False], [False] * 5])
  return attention.plain(q, k, v, mask if masked else None, causal)


def layer_norm(x, scale, bias):
  module = dense.layer_norm(1e-5, "float32", None)
  return module.apply({"params": {"scale": scale, "bias": bias}}, x)


def linear(x, kernel, bias):
  module = dense.linear(kernel.shape[1], "float32")
  return module.apply({"params": {"kernel": kernel, "bias": bias}}, x)


def qkv():
  return [normal(2, 5, 3, 4) for _ in range(3)]


PIECES = {
  "linear": (linear, [normal(3, 5, 8), normal(8, 6), normal(6)]),
  "layer norm": (layer_norm, [3.0 + normal(3, 5, 8), normal(8), normal(8)]),
  "settle": (lambda x: dense.settle(x) + jnp.sin(dense.settle(x)), [normal(3, 4)]),
  "attention": (attend, qkv()),
  "hidden": (lambda *x: attend(*x, masked=True), qkv()),
  "causal": (lambda *x: attend(*x, masked=True, causal=True), qkv()),
} | {
  name: (lambda x, f=f: dense.activate(f, x), [3 * normal(4, 5, 8)])
  for name, f in ACTIVATIONS.items()
}


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("how", ["alone", "vmap", "scan"])
def test_a_piece_is_that_of_flax(flax, name, how):
  function, args = PIECES[name]
  run = lambda: jax.jit(lambda *args: pulled(function)(*args))
  if how == "alone":
    found, expected = run()(*args), flax(run(), *args)
  else:
    args = [jnp.stack([a, -0.5 * a, 2 * a + 1]) for a in args]
    many = {
      "vmap": lambda f: lambda *args: jax.vmap(f)(*args),
      "scan": lambda f: lambda *args: jax.lax.map(lambda args: f(*args), args),
    }[how]
    found = jax.jit(many(pulled(function)))(*args)
    expected = flax(jax.jit(many(pulled(function))), *args)
  close(found, expected, 2e-6)


def tower(name):
  make, kind, options = TOWERS[name]
  inputs = (IMAGES,) if make is models.image else (TEXTS, MASK)
  return make(kind, **options), inputs


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_is_that_of_flax(flax, name):
  """The same parameters, bit for bit, and equal features and gradients."""

  def run():
    network, inputs = tower(name)
    params, stats = jax.jit(network.init)(jax.random.key(0), *inputs)

    def loss(params):
      y, _ = network.apply(params, stats, *inputs, train=True)
      return jnp.sin(y).sum(), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return params, y, grads

  (params, *found), (same, *expected) = run(), flax(run)
  jax.tree.map(np.testing.assert_array_equal, params, same)
  # A key's bias moves no weight of attention: its gradient is rounding alone.
  scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    bound = 1e-5 * max(float(jnp.abs(b).max()), 0.1 * scale)
    np.testing.assert_allclose(a, b, rtol=0, atol=bound)


def lowered(name, platform, **options):
  """The program of a gradient for devices that are not here."""
  network, inputs = tower(name)
  if options:
    network = models.image("vit_test", **options)
  device = AbstractDevice(platform, None, platform)
  axes = (AxisType.Auto,) * 2
  mesh = AbstractMesh((1, 1), sharding.AXES, axes, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    params, _ = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    loss = lambda params: network.apply(params, {}, *inputs, train=True)[0].sum()
    traced = jax.jit(jax.grad(loss)).trace(params)
    name = "cuda" if platform == "gpu" else platform
    return traced.lower(lowering_platforms=(name,)).as_text()


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("name", ["image", "remat", "text"])
def test_accelerators_get_the_program_of_flax(flax, platform, name):
  text = lowered(name, platform)
  assert text == flax(lowered, name, platform) and "stablehlo.case" not in text
  assert "stablehlo.case" in lowered(name, "cpu")


def test_bfloat16_is_left_alone(flax):
  args = ("image", "cpu")
  text = lowered(*args, dtype="bfloat16")
  assert text == flax(lambda: lowered(*args, dtype="bfloat16"))


def test_a_weight_gradient_is_one_product_of_matrices():
  x, kernel = normal(3, 5, 8), normal(8, 6)
  text = jax.jit(jax.grad(lambda k: dense.dense(x, k).sum())).lower(kernel).as_text()
  assert "(tensor<15x8xf32>, tensor<15x6xf32>) -> tensor<8x6xf32>" in text


def test_what_is_settled_is_computed_once():
  """XLA computes a sum again in every reader; settled, it is an array of its own."""

  def program(settle):
    def run(x, y):
      total = settle(x + y)
      return total.T.reshape(-1) + 1, total @ total, total - 3

    x = normal(16, 16)
    return jax.jit(run).lower(x, x).compile().as_text()

  assert "conditional(" in program(dense.settle)
  assert "conditional(" not in program(lambda x: x)
