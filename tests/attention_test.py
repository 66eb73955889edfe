"""Kernels of attention against the plain form, and the programs that hold them."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from clj import models, sharding
from clj.models import attention
from clj.planning import hlo
from tests import tpu


def inputs(tokens, width, dtype="float32", keys=None, n=2, heads=2):
  rng = np.random.default_rng(0)
  shape = lambda length: (n, length, heads, width)
  return [
    jnp.asarray(2 * rng.normal(size=shape(length)), dtype)
    for length in (tokens, keys or tokens, keys or tokens)
  ]


def test_plain_is_exact_for_equal_keys_and_hidden_ones():
  q, k, v = inputs(5, 4)
  equal = jnp.broadcast_to(k[:, :1], k.shape)
  expected = jnp.broadcast_to(v.mean(1, keepdims=True), v.shape)
  np.testing.assert_allclose(attention.plain(q, equal, v), expected, rtol=0, atol=1e-6)
  seen = jnp.broadcast_to(jnp.arange(5) < 3, (2, 5))
  found = attention.plain(q, k, v, seen)
  expected = attention.plain(q, k[:, :3], v[:, :3])
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  "tokens, keys, width, dtype, causal, masked",
  [
    (50, None, 64, "float32", False, False),
    (77, None, 64, "float32", True, True),
    (197, None, 72, "float32", False, True),
    (128, None, 64, "bfloat16", True, False),
    (7, 130, 80, "float32", False, True),  # another sequence's keys
    pytest.param(729, None, 72, "float32", True, True, marks=pytest.mark.slow),
    pytest.param(577, None, 64, "bfloat16", False, True, marks=pytest.mark.slow),
  ],
)
def test_the_tpu_kernel_is_the_plain_form(tokens, keys, width, dtype, causal, masked):
  """Value and gradients, run by the interpreter of Pallas."""
  q, k, v = inputs(tokens, width, dtype, keys)
  mask = None
  if masked:  # not only at the end, and rows of their own
    mask = np.random.default_rng(1).uniform(size=k.shape[:2]) < 0.6
    mask[:, 0] = True
    mask = jnp.asarray(mask)

  @partial(jax.jit, static_argnums=0)
  def run(form, *qkv):
    y, back = jax.vjp(lambda *qkv: form(*qkv, mask, causal=causal), *qkv)
    return y, *back(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))

  with jax.numpy_rank_promotion("allow"):
    found = run(partial(attention.splash, interpret=True), q, k, v)
  for a, b in zip(found, run(attention.plain, q, k, v)):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    bound = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(a, b, rtol=0, atol=bound * np.abs(b).max())


def test_on_a_cpu_flash_is_the_plain_form():
  q, k, v = inputs(5, 4)
  found = jax.jit(attention.flash)(q, k, v)
  np.testing.assert_array_equal(found, jax.jit(attention.plain)(q, k, v))


def absent(mesh, tree):
  """Arrays that are split by rows over a mesh of devices that are not here."""
  rows = sharding.batch_sharding(mesh)
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows), tree
  )


def test_a_tpu_step_holds_the_kernel_and_gathers_nothing():
  network = models.image(
    "vit_test", width=64, dtype="bfloat16", scan=True, remat=True, attention="flash"
  )
  images = jnp.zeros((8, 32, 32, 3))
  params, _ = jax.eval_shape(network.init, jax.random.key(0), images)

  def loss(params, images):
    return jnp.square(network.apply(params, {}, images, train=True)[0]).mean()

  with tpu.compiler() as named:
    mesh = sharding.make_mesh(devices=named("v5e:2x2").devices)
    with jax.set_mesh(mesh):
      whole = sharding.replicated(mesh)
      step = jax.jit(jax.grad(loss), out_shardings=whole, in_shardings=(whole, None))
      text = step.lower(params, absent(mesh, images)).compile().as_text()
  assert "splash_mha_fwd" in text and "splash_mha_dkv" in text
  assert {c.kind for c in hlo.analyse(text).collectives} == {"all-reduce"}


def test_work_of_the_tpu_kernel_is_counted():
  """Two products, five in the backward pass; 130 tokens are filled up to 256."""
  q, k, v = inputs(130, 72, "bfloat16", n=8)

  def loss(*qkv):
    return jnp.square(attention.flash(*qkv).astype(jnp.float32)).sum()

  with tpu.compiler() as named:
    mesh = sharding.make_mesh(devices=named("v5e:2x2").devices)
    with jax.set_mesh(mesh):
      step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*absent(mesh, (q, k, v)))
      cost = hlo.analyse(step.compile().as_text())
  assert not cost.collectives
  assert cost.flops == 2 * (2 + 5) * 2 * 2 * 72 * 256**2


def on_a_gpu(function, *arrays):
  """Lowered for a GPU that is not here."""
  device = AbstractDevice("NVIDIA H100", None, "gpu")
  axes = (AxisType.Auto,) * 2
  mesh = AbstractMesh((2, 1), sharding.AXES, axes, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
  "tokens, causal, masked, kind",
  [
    (196, False, False, "NO_MASK"),
    (197, False, False, "PADDING"),  # filled up to an even number
    (77, True, False, "PADDING_CAUSAL"),
    (77, True, True, "CAUSAL"),  # the mask itself is added to the scores
  ],
)
def test_on_a_gpu_it_is_cudnn(monkeypatch, tokens, causal, masked, kind):
  """As far as it goes without a GPU: the calls that XLA is given."""
  backend = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
  monkeypatch.setattr(backend, "check_cudnn_version", lambda: 91000)
  q, k, v = inputs(tokens, 72, "bfloat16")
  mask = jnp.ones((2, tokens), bool) if masked else None

  def loss(*qkv):
    y = attention.flash(*qkv, mask, causal=causal)
    assert y.shape == q.shape
    return jnp.square(y.astype(jnp.float32)).sum()

  text = on_a_gpu(jax.grad(loss, (0, 1, 2)), q, k, v).as_text()
  calls = re.findall(r"custom_call @__cudnn\$(\w+)", text)
  name = "fmhaScaleBiasSoftmax" if masked else "fmhaSoftmax"
  assert calls == [name, f"{name}Backward"]
  assert re.findall(r"mask_type\W+22: \W+22(\w+)\b", text) == [kind, kind]


def test_a_gpu_has_no_kernel_of_float32():
  with pytest.raises(ValueError, match="no float32.*bfloat16.*plain"):
    on_a_gpu(attention.flash, *inputs(4, 64))
