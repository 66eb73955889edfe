"""Encoders and heads: published sizes, dtypes, gradients of the convolution."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from clj import models
from clj.models import conv as conv_lib

# Without the classifier; torchvision's totals less 513,000 (512 features) or 2,049,000.
PUBLISHED = {
  ("resnet18", 1): 11_689_512 - 513_000,
  ("resnet34", 1): 21_797_672 - 513_000,
  ("resnet50", 1): 25_557_032 - 2_049_000,
  ("resnet101", 1): 44_549_160 - 2_049_000,
  ("resnet152", 1): 60_192_808 - 2_049_000,
}
# In millions: 24M, 94M and 375M in SimCLR's tables (arXiv:2002.05709).
PUBLISHED_MILLIONS = {
  ("resnet50", 1): 24,
  ("resnet50", 2): 94,
  ("resnet50", 4): 375,
  ("resnet200", 1): 63,
}


def sizes(network, *shapes):
  """Number of parameters, and the output, without any array made."""
  inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  params, stats = jax.eval_shape(network.init, jax.random.key(0), *inputs)
  apply = lambda *args: network.apply(*args, train=True)
  output, new_stats = jax.eval_shape(apply, params, stats, *inputs)
  assert jax.tree.map(lambda x: x.shape, stats) == jax.tree.map(
    lambda x: x.shape, new_stats
  )
  for leaf in jax.tree.leaves((params, stats, output, new_stats)):
    assert leaf.dtype == jnp.float32 and not leaf.weak_type
  return sum(leaf.size for leaf in jax.tree.leaves(params)), output.shape


@pytest.mark.parametrize("name, width", PUBLISHED)
def test_parameters_of_torchvision(name, width):
  count, _ = sizes(models.image(name, width=width), (2, 224, 224, 3))
  assert count == PUBLISHED[name, width]


@pytest.mark.parametrize("name, width", PUBLISHED_MILLIONS)
def test_parameters_of_the_papers(name, width):
  network = models.image(name, width=width, dtype="bfloat16")
  count, shape = sizes(network, (2, 224, 224, 3))
  # "24M" of the papers is 23.5M without the classifier.
  assert abs(count / 1e6 - PUBLISHED_MILLIONS[name, width]) <= 0.6
  assert shape == (2, 2048 * width)


def test_stems():
  imagenet, _ = sizes(models.image("resnet18"), (2, 32, 32, 3))
  cifar, shape = sizes(models.image("resnet18", stem="cifar"), (2, 32, 32, 3))
  assert imagenet - cifar == (49 - 9) * 3 * 64
  assert shape == (2, 512)


def test_errors_name_the_value():
  with pytest.raises(ValueError, match="'resnet19'.*resnet18, resnet34"):
    models.image("resnet19")
  with pytest.raises(ValueError, match="'cifar10'.*imagenet, cifar"):
    sizes(models.image("resnet18", stem="cifar10"), (2, 32, 32, 3))
  with pytest.raises(TypeError, match="witdh"):
    models.image("resnet18", witdh=2)


def test_projector_is_the_official_head():
  params, stats = models.projector((32, 16)).init(jax.random.key(0), jnp.ones((4, 32)))
  shapes = jax.tree.map(lambda x: x.shape, params)
  assert shapes == {
    "dense1": {"kernel": (32, 32)},
    "bn1": {"scale": (32,), "bias": (32,)},
    "dense2": {"kernel": (32, 16)},
    "bn2": {"scale": (16,)},
  }
  assert sorted(stats) == ["bn1", "bn2"]
  assert abs(float(params["dense1"]["kernel"].std()) - 0.01) < 0.001


def test_projector_variants():
  def names(**kwargs):
    head = models.projector((8, 8, 4), **kwargs)
    params, stats = head.init(jax.random.key(0), jnp.ones((4, 8)))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in leaves}

  kernels = {"dense1/kernel", "dense2/kernel", "dense3/kernel"}
  hidden = {"bn1/scale", "bn1/bias", "bn2/scale", "bn2/bias"}
  assert names(norm=False, last_norm=False) == kernels
  assert names(last_gamma=False) == kernels | hidden
  assert names(last_norm=False, bias=True) == kernels | hidden | {
    "dense1/bias",
    "dense2/bias",
  }
  assert names(norm=False, last_norm=False, last_bias=True) == kernels | {"dense3/bias"}


def test_linear_starts_at_zero_and_learns():
  network = models.linear(3)
  x = jax.random.normal(jax.random.key(0), (4, 8))
  params, stats = network.init(jax.random.key(0), x)
  loss = lambda params: (network.apply(params, stats, x, train=True)[0][:, 0]).sum()
  assert not stats and float(loss(params)) == 0.0
  assert float(jnp.abs(jax.grad(loss)(params)["dense"]["kernel"]).max()) > 0.1


def test_batch_norm():
  """Train: the batch's statistics; otherwise the running ones, unchanged."""
  head = models.projector((6,), last_beta=True, std=None)
  x = np.random.default_rng(0).normal(3.0, 2.0, (64, 5)).astype(np.float32)
  params, stats = head.init(jax.random.key(0), x)
  y = x @ np.asarray(params["dense1"]["kernel"])
  out, new = head.apply(params, stats, x, train=True)
  np.testing.assert_allclose(
    out, (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5), rtol=0, atol=2e-5
  )
  np.testing.assert_allclose(new["bn1"]["mean"], 0.1 * y.mean(0), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(new["bn1"]["var"], 0.9 + 0.1 * y.var(0), rtol=1e-4)
  out, same = head.apply(params, new, x, train=False)
  scale = np.sqrt(np.asarray(new["bn1"]["var"]) + 1e-5)
  np.testing.assert_allclose(
    out, (y - np.asarray(new["bn1"]["mean"])) / scale, rtol=0, atol=2e-5
  )
  assert same is new


def test_batch_norm_far_from_zero():
  """A mean of many standard deviations does not eat the variance."""
  head = models.projector((3,), last_beta=True)
  rng = np.random.default_rng(0)
  y = (1000.0 + 0.1 * rng.normal(size=(4096, 3))).astype(np.float32)
  params, stats = head.init(jax.random.key(0), y)
  params["dense1"]["kernel"] = jnp.eye(3)
  out, _ = head.apply(params, stats, y, train=True)
  y = y.astype(np.float64)
  expected = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5)
  np.testing.assert_allclose(out, expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("zero", [True, False])
def test_zero_last_gamma(zero):
  """A fresh residual branch adds nothing, and can start at one instead."""
  network = models.image("resnet_test", zero_last_gamma=zero)

  @jax.jit
  def last_scale(rng):
    params, _ = network.init(rng, jnp.ones((2, 16, 16, 3)))
    return params["stage1_block1"]["bn2"]["scale"]

  np.testing.assert_array_equal(last_scale(jax.random.key(0)), 0.0 if zero else 1.0)


CONVS = [  # n, side, inputs, outputs, size, stride
  (16, 32, 5, 7, 3, 1),
  (32, 32, 8, 12, 3, 2),
  (24, 16, 6, 4, 1, 2),
  (12, 9, 3, 4, 3, 2),
  (8, 24, 3, 4, 7, 2),
  (8, 32, 3, 4, 2, 2),
  (64, 4, 16, 8, 3, 1),
  (7, 8, 16, 8, 3, 1),
  # Channels for Winograd's form: in several chunks, in one, and with an odd side.
  (48, 8, 40, 32, 3, 1),
  (3, 6, 33, 70, 3, 1),
  (6, 7, 32, 32, 3, 1),
]


def gradients(conv, x, kernel, cotangent):
  y, pull = jax.vjp(conv, x, kernel)
  return (y, *pull(cotangent.astype(y.dtype)))


@pytest.mark.parametrize("n, side, inputs, outputs, size, stride", CONVS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_conv_gradients_are_those_of_xla(n, side, inputs, outputs, size, stride, dtype):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(n, side, side, inputs)), dtype)
  kernel = jnp.asarray(rng.normal(size=(size, size, inputs, outputs)), dtype)
  out = -(-side // stride)
  cotangent = jnp.asarray(rng.normal(size=(n, out, out, outputs)), dtype)
  ours = lambda x, kernel: conv_lib.conv(x, kernel, stride)
  xla = lambda x, kernel: jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    (((size - 1) // 2, size // 2),) * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  found = jax.jit(gradients, static_argnums=0)(ours, x, kernel, cotangent)
  wide = [array.astype(jnp.float32) for array in (x, kernel, cotangent)]
  expected = jax.jit(gradients, static_argnums=0)(xla, *wide)
  tolerance = {"float32": 3e-6, "bfloat16": 1e-2}[dtype]
  for a, b in zip(found, expected, strict=True):
    assert a.dtype == dtype
    a, b = np.asarray(a, np.float32), np.asarray(b)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
  "side, inputs, outputs, stride", [(32, 8, 4, 1), (16, 8, 4, 2), (8, 32, 36, 1)]
)
@pytest.mark.parametrize("mesh_shape", [(8, 1), (2, 2)])
def test_conv_gradients_on_a_mesh(side, inputs, outputs, stride, mesh_shape):
  """Equal to one device's; nothing travels but the sum of the weight gradient."""
  devices = np.array(jax.devices()[: np.prod(mesh_shape)]).reshape(mesh_shape)
  mesh = jax.sharding.Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  whole = NamedSharding(mesh, PartitionSpec())
  rng = np.random.default_rng(0)
  x = rng.normal(size=(64, side, side, inputs)).astype(np.float32)
  kernel = rng.normal(size=(3, 3, inputs, outputs)).astype(np.float32)

  def loss(x, kernel):
    return jnp.sin(conv_lib.conv(x, kernel, stride)).sum()

  expected = jax.jit(jax.grad(loss, (0, 1)))(x, kernel)
  args = jax.device_put(x, rows), jax.device_put(kernel, whole)
  compiled = (
    jax.jit(jax.grad(loss, (0, 1)), out_shardings=(rows, whole)).lower(*args).compile()
  )
  text = compiled.as_text()
  collectives = re.findall(
    r"(all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text
  )
  assert set(collectives) == {"all-reduce"}
  for a, b in zip(compiled(*args), expected, strict=True):
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("channels, stride", [(8, 2), (32, 1)])
def test_accelerators_get_plain_convolutions(platform, channels, stride):
  """The CPU's formulation (products, a loop) is in none of their programs."""
  x = jax.ShapeDtypeStruct((64, 32, 32, channels), jnp.float32)
  kernel = jax.ShapeDtypeStruct((3, 3, channels, channels), jnp.float32)
  loss = lambda x, kernel: (conv_lib.conv(x, kernel, stride) ** 2).sum()
  traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, kernel)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert text.count("stablehlo.convolution") == 3
  assert "stablehlo.dot" not in text and "stablehlo.while" not in text
  cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
  assert "stablehlo.dot" in cpu and "stablehlo.while" in cpu


@pytest.mark.parametrize("inputs, stride", [(3, 2), (32, 1)])
def test_conv_under_vmap(inputs, stride):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 4, 8, 8, inputs)).astype(np.float32)
  kernel = rng.normal(size=(3, 3, 3, inputs, 32)).astype(np.float32)
  grads = jax.grad(lambda x, k: jnp.sin(conv_lib.conv(x, k, stride)).sum(), (0, 1))
  found = jax.jit(jax.vmap(grads))(x, kernel)
  for i in range(3):
    for a, b in zip(found, jax.jit(grads)(x[i], kernel[i]), strict=True):
      np.testing.assert_allclose(a[i], b, rtol=0, atol=3e-6 * np.abs(b).max())
