"""encode_in_chunks: exact, and no more work or traffic than the whole batch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from clj import losses

B, D, H = 64, 24, 12


def _params(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 4, jnp.float32)
  return {"w1": draw(D, 40), "w2": draw(40, H), "log_scale": jnp.float32(1.5)}


def _inputs(seed=1):
  rng = np.random.default_rng(seed)
  draw = lambda: jnp.asarray(rng.standard_normal((B, D)), jnp.float32)
  return {"image": draw(), "text": draw()}


def _encode(params, x, rng=None):
  h = jnp.tanh(x @ params["w1"])
  if rng is not None:
    h = h * jax.random.bernoulli(rng, 0.5, h.shape)
  return losses.l2_normalize(h @ params["w2"])


def _towers(params, x, chunk, rng=None):
  if chunk is None:
    return {k: _encode(params, v) for k, v in x.items()}
  args = {} if rng is None else {"rng": rng}
  both = lambda x, *rng: {k: _encode(params, v, *rng) for k, v in x.items()}
  return losses.encode_in_chunks(both, x, chunk, **args)


def _loss(params, x, chunk, rng=None):
  z = _towers(params, x, chunk, rng)
  return losses.clip(z["image"], z["text"], jnp.exp(params["log_scale"]))


def _close(got, want, tolerance=2e-6):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("chunk", [1, 16, B])
def test_value_and_gradient_are_those_of_the_whole_batch(chunk):
  params, x = _params(), _inputs()
  step = jax.jit(jax.value_and_grad(_loss), static_argnums=2)
  _close(step(params, x, chunk), step(params, x, None))


def test_rows_keep_their_order():
  x = jnp.arange(12.0)[:, None]
  np.testing.assert_array_equal(losses.encode_in_chunks(lambda x: 2 * x, x, 4), 2 * x)


def test_averaged_micro_batches_are_another_objective():
  params, x = _params(), _inputs()
  grad = jax.jit(jax.grad(_loss), static_argnums=2)
  whole = grad(params, x, None)["w1"]
  parts = [{k: v[i : i + 16] for k, v in x.items()} for i in range(0, B, 16)]
  grads = [grad(params, part, None)["w1"] for part in parts]
  mean = sum(grads) / len(grads)
  assert np.linalg.norm(mean - whole) > 0.1 * np.linalg.norm(whole)


def test_dropout_is_the_same_in_the_recomputation():
  """The gradient agrees with a difference quotient of the same random function."""
  params, x, rng = _params(), _inputs(), jax.random.key(3)
  loss = jax.jit(_loss, static_argnums=2)
  grads = jax.jit(jax.grad(_loss), static_argnums=2)(params, x, 16, rng)
  step = 1e-2
  value = lambda t: loss({**params, "w2": params["w2"] + t * grads["w2"]}, x, 16, rng)
  slope = (value(step) - value(-step)) / (2 * step)
  np.testing.assert_allclose(slope, jnp.sum(grads["w2"] ** 2), rtol=1e-2)
  assert value(0.0) != loss(params, x, 16, jax.random.key(4))


def test_aux_is_stacked_by_chunk():
  x = jnp.arange(12.0)[:, None]
  encode = lambda x: (x, jnp.mean(x))
  z, means = losses.encode_in_chunks(encode, x, 4, has_aux=True)
  np.testing.assert_array_equal(z, x)
  np.testing.assert_allclose(means, [4.5, 5.5, 6.5])  # rows 0, 3, 6, 9 and so on


def test_errors_say_both_figures():
  x = jnp.zeros((12, 2))
  with pytest.raises(ValueError, match="batch of 12 .* chunks of 5"):
    losses.encode_in_chunks(lambda x: x, x, 5)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  with (
    jax.set_mesh(mesh),
    pytest.raises(ValueError, match="chunk of 4 .* 8 devices"),
  ):
    losses.encode_in_chunks(lambda x: x, jnp.zeros((16, 2)), 4)


def _compiled(chunk):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh):
    rows = NamedSharding(mesh, PartitionSpec("data"))
    copies = NamedSharding(mesh, PartitionSpec())
    x = {k: jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=rows) for k in _inputs()}
    params = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=copies), _params()
    )
    grad = lambda params, x: jax.grad(_loss)(params, x, chunk)
    return jax.jit(grad, out_shardings=copies).lower(params, x).compile().as_text()


def test_no_collective_moves_inputs():
  for text in (_compiled(16), _compiled(8)):
    moved = re.findall(
      r"= (.*?) (?:all-gather|all-to-all|collective-permute|reduce-scatter)", text
    )
    assert moved  # the loss gathers embeddings
    assert not any(re.search(rf"\b{D}\]|,{D},", shape) for shape in moved), moved


def test_work_per_device_does_not_grow_with_the_chunks():
  """Every product of a tower has a device's share of the chunk's rows."""
  for chunk in (B, 32, 16, 8):
    text = _compiled(chunk)
    rows = [
      int(n) for n in re.findall(r"f32\[(\d+),40\]\S* (?:dot|custom-call)\(", text)
    ]
    share = chunk // 8
    assert share in rows and set(rows) <= {share, D, H}, (chunk, rows)  # D, H: weights
