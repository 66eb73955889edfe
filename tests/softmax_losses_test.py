"""The tiled softmax and sigmoid losses: exact, sharded, and small.

Every loss is held against a float64 twin in NumPy, against itself on 1, 2, 4 and 8
devices in both forms, and against what a user's own pmap or shard_map step would do.
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from clj import losses
from clj.losses import softmax

P = PartitionSpec


# The twins: dense, float64, with the positive kept apart as in the losses.


def _lse(s, axis):
  top = np.maximum(np.max(s, axis=axis, keepdims=True), -1e300)
  return np.squeeze(top, axis) + np.log(np.sum(np.exp(s - top), axis=axis))


def _softmax_rows(c, positive, keep, scale, weight):
  """Rows' losses, and the gradients of sum(weight * rows) in c and in the scale."""
  s = np.where(keep, scale * c, -np.inf)
  own = c[np.arange(len(c)), positive]
  with np.errstate(divide="ignore"):
    lse = _lse(s, 1)
  margin = lse - scale * own
  g = weight * np.exp(-np.logaddexp(0, -margin))
  lse = np.where(np.isfinite(lse), lse, 0.0)[:, None]
  w = g[:, None] * np.exp(s - lse)
  dscale = np.sum(w * (c - own[:, None]))
  w[np.arange(len(c)), positive] -= g
  return np.logaddexp(0, margin), w, dscale


def clip_twin(x, y, scale, bias=None, ids=None, weight=None):
  x, y, n = x.astype(np.float64), y.astype(np.float64), len(x)
  ids = np.arange(n) if ids is None else ids
  weight = np.full(n, 1 / n) if weight is None else weight
  c, keep, i = x @ y.T, ids[:, None] != ids[None, :], np.arange(n)
  rows, w, dscale = _softmax_rows(c, i, keep, scale, weight / 2)
  cols, w_cols, dscale_cols = _softmax_rows(c.T, i, keep, scale, weight / 2)
  w = scale * (w + w_cols.T)
  value = np.sum(weight * (rows + cols) / 2)
  return value, (w @ y, w.T @ x, dscale + dscale_cols)


def info_nce_twin(x, y, scale, bias=None, ids=None, weight=None):
  x, y, n = x.astype(np.float64), y.astype(np.float64), len(x)
  ids = np.arange(n) if ids is None else ids
  weight = np.full(n, 1 / n) if weight is None else weight
  keep = ids[:, None] != ids[None, :]
  rows, w, dscale = _softmax_rows(x @ y.T, np.arange(n), keep, scale, weight)
  return np.sum(weight * rows), (scale * w @ y, scale * w.T @ x, dscale)


def nt_xent_twin(x, y, scale, bias=None, ids=None, weight=None):
  n = len(x)
  ids = np.arange(n) if ids is None else ids
  weight = np.full(n, 1 / n) if weight is None else weight
  ids, weight = np.tile(ids, 2), np.tile(weight / 2, 2)
  z = np.concatenate([x, y]).astype(np.float64)
  norm = np.linalg.norm(z, axis=1, keepdims=True)
  u = z / norm
  keep = ids[:, None] != ids[None, :]
  partner = np.roll(np.arange(2 * n), n)
  rows, w, dscale = _softmax_rows(u @ u.T, partner, keep, scale, weight)
  d = scale * (w + w.T) @ u
  d = (d - u * np.sum(d * u, axis=1, keepdims=True)) / norm
  return np.sum(weight * rows), (d[:n], d[n:], dscale)


def siglip_twin(x, y, scale, bias, ids=None, weight=None):
  x, y, n = x.astype(np.float64), y.astype(np.float64), len(x)
  ids = np.arange(n) if ids is None else ids
  weight = np.full(n, 1 / n) if weight is None else weight
  eye = np.eye(n, dtype=bool)
  sign = np.where(eye, 1.0, -1.0)
  keep = (ids[:, None] != ids[None, :]) | eye
  c = x @ y.T
  t = sign * (scale * c + bias)
  value = np.sum(weight[:, None] * keep * np.logaddexp(0, -t))
  w = -weight[:, None] * keep * sign * np.exp(-np.logaddexp(0, t))
  return value, (scale * w @ y, scale * w.T @ x, np.sum(w * c), np.sum(w))


def supcon_twin(z, label, scale):
  z, n = z.astype(np.float64), len(z)
  same = (label[:, None] == label[None, :]) & ~np.eye(n, dtype=bool)
  target = same / np.maximum(same.sum(1), 1)[:, None]
  used = same.any(1) / n
  c = z @ z.T
  mean = np.sum(target * c, axis=1)
  s = np.where(np.eye(n, dtype=bool), -np.inf, scale * (c - mean[:, None]))
  lse = _lse(s, 1)
  p = np.exp(s - lse[:, None])
  w = used[:, None] * (p - target)
  dscale = np.sum(used * np.sum(p * (c - mean[:, None]), axis=1))
  return np.sum(used * lse), (scale * (w + w.T) @ z, dscale)


def _weighted(rows, weight):
  n = len(weight)
  if len(rows) == 2 * n:  # both views
    return jnp.sum(weight * (rows[:n] + rows[n:])) / 2
  return jnp.sum(weight * rows)


def _nt_xent(x, y, scale, bias, **kw):
  return losses.nt_xent(x, y, 1 / scale, **kw)


def _info_nce(x, y, scale, bias, **kw):
  return losses.info_nce(x, y, 1 / scale, **kw)


def _clip(x, y, scale, bias, **kw):
  return losses.clip(x, y, scale, **kw)


LOSSES = {
  "nt_xent": (_nt_xent, nt_xent_twin),
  "info_nce": (_info_nce, info_nce_twin),
  "clip": (_clip, clip_twin),
  "siglip": (losses.siglip, siglip_twin),
}


def _pairs(kind, n, d=32, seed=0):
  rng = np.random.default_rng(seed)
  x, y = rng.standard_normal((2, n, d))
  if kind == "aligned":
    y = x + 1e-2 * y
  if kind == "clustered":
    centre = rng.standard_normal((32, d))[rng.integers(0, 32, n)]
    x, y = centre + 0.3 * x, centre + 0.3 * y
  unit = lambda z: (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
  return unit(x), unit(y)


@functools.cache
def _jitted(name):
  loss = LOSSES[name][0]
  arguments = (0, 1, 2, 3) if name == "siglip" else (0, 1, 2)
  return jax.jit(jax.value_and_grad(loss, arguments))


def _error(got, want):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  norm = np.linalg.norm(want)
  return np.linalg.norm(got - want) / norm if norm > 1e-20 else 0.0


def _check(got, want, embeddings, scale=5e-5, bias=2e-4):
  (value, grads), (value_64, grads_64) = got, want
  assert abs(value - value_64) <= 1e-5 * max(1.0, abs(value_64))
  limits = (embeddings, embeddings, scale, bias)
  errors = [_error(a, b) for a, b in zip(grads, grads_64, strict=True)]
  assert all(e <= limit for e, limit in zip(errors, limits)), errors


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
@pytest.mark.parametrize("kind", ["random", "aligned", "clustered"])
@pytest.mark.parametrize("name", ["nt_xent", "clip", "siglip"])
def test_float32_against_float64(name, kind, scale):
  n = 4096 if scale == 20 else 600  # 600: no multiple of the tile
  n = n // 2 if name == "nt_xent" else n
  x, y = _pairs(kind, n)
  bias = -scale / 2
  want = LOSSES[name][1](x, y, scale, bias)
  if kind == "aligned" and scale >= 20 and name != "siglip":
    assert want[0] < 0.01
  got = _jitted(name)(x, y, jnp.float32(scale), jnp.float32(bias))
  _check(got, want, 1e-5 if scale <= 20 else 3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [20.0, 100.0])
@pytest.mark.parametrize("name", ["nt_xent", "clip", "siglip"])
def test_float32_on_tight_clusters(name, scale):
  """What is left of the gradient of the scale is 1e-5 of its terms."""
  for seed in range(3):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, 2048, 128))
    centre = rng.standard_normal((64, 128))[rng.integers(0, 64, 2048)]
    z = centre + 0.1 * np.stack([x, y])
    x, y = np.float32(z / np.linalg.norm(z, axis=2, keepdims=True))
    want = LOSSES[name][1](x, y, scale, -scale / 2)
    got = _jitted(name)(x, y, jnp.float32(scale), jnp.float32(-scale / 2))
    _check(got, want, 1e-5 if scale <= 20 else 3e-5)


@pytest.mark.parametrize("spread", [1.0, 0.3, 0.1])
def test_supcon_float32_on_clusters(spread):
  """Where the softmax is nearly its target, what is left is still accurate."""
  loss = lambda z, label, scale: losses.supcon(z, label, 1 / scale)
  step = jax.jit(jax.value_and_grad(loss, (0, 2)))
  rng = np.random.default_rng(0)
  for clusters in 8, 256:
    label = rng.integers(0, clusters, 1000)
    z = rng.standard_normal((clusters, 128))[label]
    z += spread * rng.standard_normal(z.shape)
    z = np.float32(z / np.linalg.norm(z, axis=1, keepdims=True))
    for scale in 1.0, 10.0, 20.0, 100.0:
      value, (dz, dscale) = step(z, label, jnp.float32(scale))
      value_64, (dz_64, dscale_64) = supcon_twin(z, label, scale)
      assert abs(value - value_64) <= 1e-5 * max(1.0, value_64)
      assert _error(dz, dz_64) <= (1e-5 if scale <= 20 else 3e-5), (clusters, scale)
      assert _error(dscale, dscale_64) <= 5e-5, (clusters, scale)


@pytest.mark.parametrize("kind", ["random", "aligned", "clustered"])
@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_operands(name, kind):
  x, y = (jnp.asarray(z, jnp.bfloat16) for z in _pairs(kind, 640))
  want = LOSSES[name][1](np.float32(x), np.float32(y), 20.0, -5.0)
  got = _jitted(name)(x, y, jnp.float32(20), jnp.float32(-5))
  assert got[1][0].dtype == jnp.bfloat16 and got[0].dtype == jnp.float32
  _check(got, want, 1e-2, 1e-2, 1e-2)


@pytest.mark.parametrize("name", LOSSES)
def test_no_overflow(name):
  """Scale 1000, rows of zeros, duplicates, and both signs of the similarity."""
  x, y = _pairs("random", 600)
  x[3], y[4], x[5] = 0.0, 0.0, 0.0
  x[6:9], y[6:9] = x[6], x[6]
  y[10] = -x[10]
  value, grads = _jitted(name)(x, y, jnp.float32(1000), jnp.float32(-500))
  assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in grads)
  if name != "nt_xent":  # which is not differentiable at 0
    want = LOSSES[name][1](x, y, 1000.0, -500.0)
    _check((value, grads), want, 1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_one_pair(name):
  x, y = _pairs("random", 1)
  value, grads = _jitted(name)(x, y, jnp.float32(5), jnp.float32(-1))
  value_64, grads_64 = LOSSES[name][1](x, y, 5.0, -1.0)
  np.testing.assert_allclose(value, value_64, rtol=1e-5, atol=1e-7)
  for a, b in zip(grads, grads_64, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_ids_and_weights(name):
  """Pairs of equal id are no negatives; rows have cotangents of their own, some 0."""
  rng = np.random.default_rng(5)
  x, y = _pairs("random", 96, seed=2)
  ids = rng.integers(0, 40, 96)
  weight = np.float32(rng.random(96) * (rng.random(96) > 0.4))
  loss, twin = LOSSES[name]

  def weighted(x, y, scale, bias):
    rows = loss(x, y, scale, bias, ids=jnp.asarray(ids), reduction="none")
    return _weighted(rows, weight)

  arguments = (0, 1, 2, 3) if name == "siglip" else (0, 1, 2)
  step = jax.jit(jax.value_and_grad(weighted, arguments))
  want = twin(x, y, 7.0, -2.0, ids=ids, weight=np.float64(weight))
  scalars = jnp.float32(7), jnp.float32(-2)
  _check(step(x, y, *scalars), want, 1e-5)
  with jax.set_mesh(_mesh(4)):
    _check(jax.jit(lambda *a: step(*a))(x, y, *scalars), want, 1e-5)


def _mesh(devices, name="data"):
  if name == "data" and devices % 2 == 0:
    shape, names = (devices // 2, 2), ("data", "fsdp")
  else:
    shape, names = (devices,), (name,)
  types = (AxisType.Auto,) * len(shape)
  return jax.make_mesh(shape, names, types, devices=jax.devices()[:devices])


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_devices_agree(name, ring):
  loss = LOSSES[name][0]
  arguments = (0, 1, 2, 3) if name == "siglip" else (0, 1, 2)
  x, y = _pairs("clustered", 56, d=16)
  args = x, y, jnp.float32(10), jnp.float32(-3)
  value, grads = _jitted(name)(*args)
  for devices in 2, 4, 8:
    mesh = _mesh(devices)
    with jax.set_mesh(mesh):
      rows = NamedSharding(mesh, P(mesh.axis_names))
      split = jax.device_put(args[:2], rows)
      step = jax.value_and_grad(functools.partial(loss, ring=ring), arguments)
      got, got_grads = jax.jit(step)(*split, *args[2:])
    np.testing.assert_allclose(got, value, rtol=1e-6)
    assert got_grads[0].sharding.is_equivalent_to(rows, 2)
    for a, b in zip(got_grads, grads, strict=True):
      assert _error(a, b) < 1e-5


def test_a_batch_that_does_not_divide_is_one_line():
  z = jnp.ones((12, 4))
  with jax.set_mesh(_mesh(8)):
    for loss, *_ in LOSSES.values():
      with pytest.raises(ValueError, match="12 does not divide over the 8 devices"):
        loss(z, z, 1.0, 0.0)


# The primitive, beyond the pairs.


def _dense(x, y, scale, reference=None, bias=None, y_scale=None, rid=None, cid=None):
  c = jnp.matmul(x, y.T, precision="highest")
  c = c if y_scale is None else c * y_scale[None, :]
  s = scale * (c if reference is None else c - reference[:, None])
  s = s if bias is None else s + bias[None, :]
  if rid is not None:
    s = jnp.where(rid[:, None] == cid[None, :], -jnp.inf, s)
  return jax.nn.logsumexp(s, axis=1)


@pytest.mark.parametrize("form", ["one", "gather", "ring"])
@pytest.mark.parametrize("options", ["plain", "reference", "logq", "scaled", "masked"])
def test_primitive_options_against_dense_autodiff(options, form):
  """More columns (41) than rows, a number that the devices do not divide."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  n, m, d = 24, 41, 8
  args = {"x": draw(n, d), "y": draw(m, d), "scale": jnp.float32(1.7)}
  ids = {}
  if options == "reference":
    args["reference"] = draw(n)
  if options == "logq":
    args["bias"] = draw(m)
  if options in ("scaled", "masked"):
    args["y_scale"] = jnp.exp(draw(m))
  if options == "masked":
    args |= {"bias": draw(m), "reference": draw(n)}
    ids = {"row_ids": rng.integers(0, 9, n), "col_ids": rng.integers(0, 9, m)}
  weight = jnp.abs(draw(n))

  def tiled(args):
    kw = {**args, **ids, "ring": form == "ring"}
    x, y, scale = kw.pop("x"), kw.pop("y"), kw.pop("scale")
    return jnp.sum(weight * softmax.log_sum_exp(x, y, scale, **kw))

  def dense(args):
    kw = {"rid": ids.get("row_ids"), "cid": ids.get("col_ids")}
    return jnp.sum(weight * _dense(**args, **kw))

  want, want_grads = jax.value_and_grad(dense)(args)
  with jax.set_mesh(_mesh(1 if form == "one" else 8)):
    got, grads = jax.jit(jax.value_and_grad(tiled))(args)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for key in args:
    limit = 1e-4 if key == "scale" else 1e-5  # a sum of both signs
    assert _error(grads[key], want_grads[key]) < limit, key


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "clip"])
@pytest.mark.parametrize("form", ["one", "gather", "ring"])
def test_bounded_and_unbounded_logits_agree(name, form, monkeypatch):
  """One exponential of a logit as it is, or running maxima: the same result."""
  x, y = _pairs("clustered", 64, d=16)
  args = x, y, jnp.float32(30), jnp.float32(0)
  results = []
  for bound in softmax.BOUND, 0.0:
    monkeypatch.setattr(softmax, "BOUND", bound)
    loss = functools.partial(LOSSES[name][0], ring=form == "ring")
    with jax.set_mesh(_mesh(1 if form == "one" else 8)):
      results.append(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*args))
  (value, grads), (want, want_grads) = results
  np.testing.assert_allclose(value, want, rtol=1e-6)
  for a, b in zip(grads, want_grads, strict=True):
    assert _error(a, b) < 1e-5


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_all_columns_masked(scale):
  x = jnp.ones((3, 4))
  zeros = jnp.zeros((3,), jnp.int32)
  rows = lambda x: softmax.log_sum_exp(x, x, scale, row_ids=zeros, col_ids=zeros)
  assert np.all(rows(x) == -np.inf)
  grad = jax.grad(lambda x: jnp.sum(jax.nn.softplus(rows(x))))(x)
  np.testing.assert_array_equal(grad, 0)


def test_queue_and_hard_negatives_are_more_columns():
  rng = np.random.default_rng(1)
  q, k = _pairs("random", 16, d=8)
  queue = np.float32(rng.standard_normal((40, 8)))
  dense = lambda q, k, queue: jnp.mean(
    jax.nn.logsumexp(5 * q @ jnp.concatenate([k, queue]).T, axis=1)
    - 5 * jnp.sum(q * k, axis=1)
  )
  tiled = lambda q, k, queue: losses.info_nce(q, k, 1 / 5, negatives=queue)
  want = jax.value_and_grad(dense, (0, 1, 2))(q, k, queue)
  for devices in 1, 8:
    with jax.set_mesh(_mesh(devices)):
      got = jax.jit(jax.value_and_grad(tiled, (0, 1, 2)))(q, k, queue)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    assert all(_error(a, b) < 1e-5 for a, b in zip(got[1], want[1], strict=True))


@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "clip"])
def test_uniform_logits_give_the_logarithm_of_the_candidates(name):
  z = jnp.ones((24, 4))
  candidates = 2 * 24 - 1 if name == "nt_xent" else 24
  value = LOSSES[name][0](z, z, 3.0, 0.0)
  np.testing.assert_allclose(value, np.log(candidates), rtol=1e-6)


# Forms for a caller's own shard_map and pmap.

B, D = 32, 8


def _tower(loss, params, x, y, **kw):
  x, y = x @ params["w"], y @ params["w"]
  x, y = losses.l2_normalize(x), losses.l2_normalize(y)
  return loss(x, y, jnp.exp(params["log_scale"]), params["bias"], **kw)


def _step(loss, where, ring):
  local = functools.partial(_tower, loss, axis_name="i", ring=ring)
  mesh, specs = _mesh(8, "i"), (P(), P("i"), P("i"))

  if where == "pmap":

    def step(params, x, y):
      return jax.lax.pmean(jax.value_and_grad(local)(params, x, y), "i")

    mapped = jax.pmap(step, axis_name="i", in_axes=(None, 0, 0))
    shard = lambda z: z.reshape(8, B // 8, D)
    first = lambda tree: jax.tree.map(lambda a: a[0], tree)
    return lambda params, x, y: first(mapped(params, shard(x), shard(y)))

  mean = lambda params, x, y: jax.lax.pmean(local(params, x, y), "i")
  vma = "checked" in where
  smap = functools.partial(
    jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=vma
  )
  if "outside" in where:
    return jax.jit(jax.value_and_grad(smap(mean)))
  if vma:
    return jax.jit(smap(jax.value_and_grad(mean)))
  step = lambda *args: jax.lax.pmean(jax.value_and_grad(local)(*args), "i")
  return jax.jit(smap(step))


@pytest.mark.parametrize(
  "where", ["pmap", "inside", "inside checked", "outside", "outside checked"]
)
@pytest.mark.parametrize("name", LOSSES)
def test_a_callers_own_step(name, where):
  """A parameter before the loss and a learned scale, against the global form."""
  loss = LOSSES[name][0]
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  params = {"w": draw(D, D), "log_scale": jnp.float32(1), "bias": jnp.float32(-2)}
  x, y = draw(B, D), draw(B, D)
  dense = functools.partial(_tower, _DENSE[name])
  want, want_grads = jax.value_and_grad(dense)(params, x, y)
  for ring in (False, True) if where in ("pmap", "inside checked") else (False,):
    got, grads = _step(loss, where, ring)(params, x, y)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for key in params:
      assert _error(grads[key], want_grads[key]) < 1e-5, key


def _dense_rows(s, positive):
  return jnp.mean(jax.nn.logsumexp(s, axis=1) - s[jnp.arange(len(s)), positive])


def _dense_nt_xent(x, y, scale, bias):
  z, n = jnp.concatenate([x, y]), len(x)
  s = jnp.where(jnp.eye(2 * n, dtype=bool), -jnp.inf, scale * z @ z.T)
  return _dense_rows(s, (jnp.arange(2 * n) + n) % (2 * n))


def _dense_siglip(x, y, scale, bias):
  sign = 2 * jnp.eye(len(x)) - 1
  return -jnp.sum(jax.nn.log_sigmoid(sign * (scale * x @ y.T + bias))) / len(x)


def _dense_info_nce(x, y, scale, bias):
  return _dense_rows(scale * x @ y.T, jnp.arange(len(x)))


def _dense_clip(x, y, scale, bias):
  return (_dense_info_nce(x, y, scale, 0) + _dense_info_nce(y, x, scale, 0)) / 2


_DENSE = {
  "nt_xent": _dense_nt_xent,
  "info_nce": _dense_info_nce,
  "clip": _dense_clip,
  "siglip": _dense_siglip,
}


# What the programs contain.


def _lowered(name, dtype, n=2048):
  loss = LOSSES[name][0]
  z = jax.ShapeDtypeStruct((n, 16), dtype)
  one = jax.ShapeDtypeStruct((), jnp.float32)
  return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3))).lower(z, z, one, one)


@pytest.mark.parametrize("name", LOSSES)
def test_precision_of_the_products(name):
  dots = re.findall(r"dot_general.*", _lowered(name, jnp.float32).as_text())
  assert len(dots) >= 3
  assert all("precision = [HIGHEST, HIGHEST]" in dot for dot in dots)
  dots = re.findall(r"dot_general.*", _lowered(name, jnp.bfloat16).as_text())
  assert all(re.search(r"\(tensor<\S+xbf16>, .*-> tensor<\S+xf32>", d) for d in dots)


def _equations(jaxpr, branch, times=1):
  for eqn in jaxpr.eqns:
    yield eqn, times
    trips = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    leaves = jax.tree.leaves(eqn.params)  # loops have theirs closed
    subs = [getattr(x, "jaxpr", x) for x in leaves]
    subs = [x for x in subs if hasattr(x, "eqns")]
    for sub in subs[branch : branch + 1] if eqn.primitive.name == "cond" else subs:
      yield from _equations(sub, branch, times * trips)


def _work(name, n, d, grad, branch):
  """Multiply-adds of all products, and the largest array of the program."""
  loss = LOSSES[name][0]
  loss = jax.value_and_grad(loss, (0, 1, 2, 3)) if grad else loss
  z = jax.ShapeDtypeStruct((n, d), jnp.float32)
  one = jax.ShapeDtypeStruct((), jnp.float32)
  work, largest = 0, 0
  program = jax.make_jaxpr(loss)(z, z, one, one)
  for eqn, times in _equations(program.jaxpr, branch):
    largest = max([largest, *(v.aval.size for v in eqn.outvars)])
    if eqn.primitive.name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      lhs = eqn.invars[0].aval.shape
      depth = np.prod([lhs[i] for i in contract])
      work += times * eqn.outvars[0].aval.size * depth
  return work, largest


@pytest.mark.parametrize("branch", [0, 1])  # logits of any size, and bounded ones
@pytest.mark.parametrize("name", LOSSES)
def test_each_logit_is_computed_once_a_pass(name, branch):
  n, d = 8192, 16
  logits = n * n * d
  forward, _ = _work(name, n, d, False, branch)
  both, largest = _work(name, n, d, True, branch)
  if name == "nt_xent":  # (2n)^2 symmetric logits, half of them and half the diagonal
    assert 2 * logits < forward < 2.3 * logits
    assert both <= 4 * forward
  else:  # the logits twice, and a product for each side's gradient
    assert forward == logits and both == 4 * logits
  assert largest < n * n / 16


def _collectives(name, ring, n=512, d=32):
  mesh = _mesh(8)
  with jax.set_mesh(mesh):
    rows = NamedSharding(mesh, P(mesh.axis_names))
    copies = NamedSharding(mesh, P())
    z = jax.ShapeDtypeStruct((n, d), jnp.bfloat16, sharding=rows)
    one = jax.ShapeDtypeStruct((), jnp.float32, sharding=copies)
    loss = functools.partial(LOSSES[name][0], ring=ring)
    step = jax.jit(
      jax.value_and_grad(loss, (0, 1, 2, 3)),
      out_shardings=(copies, (rows, rows, copies, copies)),
    )
    text = step.lower(z, z, one, one).compiler_ir("stablehlo")
  return str(text)


def _results(text, op):
  """Shapes of the results of a collective in StableHLO, regions included."""
  pattern = rf'"stablehlo\.{op}"\(.*?\) -> \(?tensor<([^>]*)>'
  return [
    [int(x) for x in re.findall(r"(\d+)x", shape)]
    for shape in re.findall(pattern, text, flags=re.DOTALL)
  ]


@pytest.mark.parametrize("name", LOSSES)
def test_gather_form_has_one_gather_a_side_and_no_gradient_collective(name):
  text = _collectives(name, ring=False)
  gathers = _results(text, "all_gather")
  wide = [shape for shape in gathers if len(shape) == 2]
  assert wide == ([[1024, 32]] if name == "nt_xent" else [[512, 32]] * 2)
  for op in ("all_reduce", "reduce_scatter", "collective_permute", "all_to_all"):
    assert all(len(shape) < 2 for shape in _results(text, op)), op


@pytest.mark.parametrize("name", LOSSES)
def test_ring_form_gathers_nothing(name):
  text = _collectives(name, ring=True)
  assert not _results(text, "all_gather")
  hops = _results(text, "collective_permute")
  assert [64, 32] in hops and all(shape in ([64, 32], [64]) for shape in hops)
  for op in ("all_reduce", "reduce_scatter", "all_to_all"):
    assert all(not shape for shape in _results(text, op)), op


def _tpu(*flags):
  """Records of `benchmarks.loss_tpu`, in a process of its own."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed")
  command = [sys.executable, "-m", "benchmarks.loss_tpu", *flags]
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # a CPU's
  done = subprocess.run(command, capture_output=True, text=True, env=env)
  assert done.returncode == 0, done.stderr[-2000:]
  records = [json.loads(line) for line in done.stdout.splitlines()]
  return {(r["loss"], r["form"], r["batch"]): r for r in records}


@pytest.mark.slow
def test_memory_and_traffic_on_256_tpus():
  batches = 32768, 1048576
  found = _tpu(
    "--losses=nt_xent,clip",
    "--forms=gather,ring",
    f"--batches={batches[0]},{batches[1]}",
  )
  for name in "nt_xent", "clip":
    gather, ring = (found[name, form, batches[1]] for form in ("gather", "ring"))
    assert gather["temporaries_mib"] <= 2.1 * 1024
    assert gather["collectives"]["all-gather"][1] == 2 * batches[1] * 512 * 2
    assert set(gather["collectives"]) == {"all-gather", "all-reduce"}
    assert gather["collectives"]["all-reduce"][1] <= 8 * 4 * batches[1]
    assert ring["temporaries_mib"] <= 16
    assert "all-gather" not in ring["collectives"]
    sides = 2 * batches[0] * 512 * 2 / 2**20
    assert found[name, "gather", batches[0]]["temporaries_mib"] <= sides + 1


@pytest.mark.slow
def test_memory_on_2048_tpus_is_that_of_256():
  small, large = 1048576, 8388608
  flags = "--losses=nt_xent,clip", "--forms=ring"
  many = _tpu(*flags, "--topology=v5p:8x16x16", f"--batches={large}")
  few = _tpu(*flags, "--topology=v5p:8x8x4", f"--batches={small}")
  for name in "nt_xent", "clip":
    temporaries = many[name, "ring", large]["temporaries_mib"]
    assert temporaries <= 40
    assert temporaries <= few[name, "ring", small]["temporaries_mib"] * 1.05 + 0.1
