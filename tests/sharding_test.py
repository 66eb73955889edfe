"""Parameters split over "fsdp": the rules, what the program moves, what it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from clj import models, sharding, train
from clj.method import Aux, Method, keep
from clj.planning import chips, hlo
from clj.planning.step import compile_step
from configs import simclr
from tests import tpu

WIDE, ROWS = (1024, 2048), 512  # 8 MiB in float32: the default rule splits it


def student_and_teacher():
  def init(rng, batch):
    del batch
    params = {"kernel": 0.01 * jax.random.normal(rng, WIDE), "bias": jnp.zeros(WIDE[1])}
    return params, {"teacher": jax.tree.map(lambda x: x + 0, params)}

  def loss(params, extra, batch, rng, step):
    apply = lambda p: jnp.tanh(batch["image"] @ p["kernel"] + p["bias"][None])
    target = jax.lax.stop_gradient(apply(extra["teacher"]))
    y = apply(params)
    return jnp.square(y - 1 - target).mean(), (extra, Aux({}, y))

  def post(params, extra, step):
    ema = lambda t, p: 0.9 * t + 0.1 * p
    return params, {"teacher": jax.tree.map(ema, extra["teacher"], params)}

  return Method(init, loss, post, lambda params, extra, batch: {})


def compiled(method, mesh, rows=ROWS):
  """(state of shapes, the compiled train step) with AdamW."""
  tx = optax.adamw(1e-3)
  batch = {
    "image": jax.ShapeDtypeStruct(
      (rows, WIDE[0]), jnp.float32, sharding=sharding.batch_sharding(mesh)
    )
  }

  def init(key, batch):
    params, extra = method.init(key, batch)
    zero = jnp.zeros((), jnp.int32)
    return train.TrainState(zero, key, params, extra, tx.init(params))

  state = jax.eval_shape(init, jax.eval_shape(jax.random.key, 0), batch)
  shardings = sharding.state_shardings(state, mesh)
  place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
  step = jax.jit(
    train.make_train_step(method, tx, lambda rng, batch: batch),
    donate_argnums=0,
    out_shardings=(shardings, sharding.replicated(mesh)),
  )
  state = jax.tree.map(place, state, shardings)
  with jax.set_mesh(mesh):
    return state, step.lower(state, batch).compile()


def test_each_device_has_its_rows():
  """`by_rows`: inside a mesh, inside its own map, and where the rows do not divide."""
  seen = []

  def double(x, more):
    seen.append(len(x))
    return 2 * x + more["y"]

  def run(rows):
    x = jnp.arange(3.0 * rows).reshape(rows, 3)
    both = lambda x: sharding.by_rows(double, x, {"y": x, "none": None})
    nested = lambda x: sharding.by_rows(both, x)
    np.testing.assert_array_equal(jax.jit(both)(x), 3 * x)
    np.testing.assert_array_equal(jax.jit(nested)(x), 3 * x)

  run(16)
  with jax.set_mesh(sharding.make_mesh(4, 2)):
    run(16)
    run(3)
  assert seen == [16, 16, 2, 2, 3, 3]


@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_collectives_of_a_tpu_step_are_what_the_rules_imply(fsdp):
  with tpu.compiler() as topology:
    mesh = sharding.make_mesh(data=-1, fsdp=fsdp, devices=topology("v5e:2x4").devices)
    state, step = compiled(student_and_teacher(), mesh)
  kernel, bias = int(np.prod(WIDE)), WIDE[1]
  # Parameters, optimiser state (two moments) and teacher: an fsdp-th of each.
  split = [
    leaf
    for leaf in jax.tree.leaves(dataclasses.replace(state, rng=jnp.zeros(())))
    if leaf.shape == WIDE
  ]
  assert len(split) == 4
  for leaf in split:
    assert leaf.sharding.shard_shape(WIDE) == (WIDE[0], WIDE[1] // fsdp)
  arguments = step.memory_analysis().argument_size_in_bytes
  expected = 4 * (4 * kernel / fsdp + 4 * bias + ROWS // 8 * WIDE[0])
  assert arguments == pytest.approx(expected, rel=0.01)

  found, gathers = {}, []
  for one in hlo.analyse(step.as_text()).collectives:
    if one.bytes > 1024:  # not metrics, which are scalars
      key = one.kind, one.group
      found[key] = found.get(key, 0) + one.count * one.bytes
      gathers += [one] if one.kind == "all-gather" else []
  near = lambda size: pytest.approx(size, abs=64)  # the loss is summed along with them
  if fsdp == 1:  # plain data parallelism: the gradients are summed, nothing else moves
    assert found == {("all-reduce", 8): near(4 * (kernel + bias))}
    return
  # Student and teacher, once each. A TPU's products take bfloat16 operands, so that the
  # compiler may gather these.
  assert len(gathers) == 2
  assert all(one.bytes in (2 * kernel, 4 * kernel) for one in gathers)
  found.pop(("all-gather", fsdp))
  assert found.pop(("reduce-scatter", fsdp)) == near(4 * kernel)
  if fsdp == 4:  # then the shards are summed over "data"
    assert found.pop(("all-reduce", 2)) == near(4 * kernel // fsdp)
  assert found == {("all-reduce", 8): near(4 * bias)}


PICTURES = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
VIT = {"name": "vit_test", "width": 64, "depth": 2, "heads": 2, "scan": True}


@pytest.mark.parametrize(
  "model",
  [
    {"name": "resnet_test"},
    VIT,
    pytest.param(VIT | {"remat": True}, marks=pytest.mark.slow),
  ],
  ids=["resnet", "scan", "scan_remat"],
)
def test_split_parameters_give_the_same_step(model, monkeypatch):
  monkeypatch.setattr(sharding, "SMALL", 1024)
  config = simclr.get_config("smoke").to_dict() | {"model": model}
  sections = ("seed", "batch_size", "total_steps", "method", "model", "optim")
  views = config["data"]["augment"]
  results = {}
  for fsdp in (1, 4):
    mesh = sharding.make_mesh(data=2, fsdp=fsdp, devices=jax.devices()[: 2 * fsdp])
    rows = config["batch_size"]
    batch = {
      "index": np.arange(rows, dtype=np.int32),
      "label": np.zeros(rows, np.int32),
      "image": PICTURES[:rows],
    }
    with jax.set_mesh(mesh):
      batch = sharding.to_global(batch, mesh)
      program = train.build(
        batch, mesh, augment=views, **{k: config[k] for k in sections}
      )
      state = program.init(jax.random.key(0))
      split = [x for x in jax.tree.leaves(state.params) if not x.is_fully_replicated]
      assert bool(split) == (fsdp > 1)
      for leaf, struct in zip(jax.tree.leaves(state), jax.tree.leaves(program.state)):
        assert leaf.sharding == struct.sharding
      state, metrics = program.step(state, batch)
      for leaf, struct in zip(jax.tree.leaves(state), jax.tree.leaves(program.state)):
        assert leaf.sharding == struct.sharding
      results[fsdp] = jax.device_get((state.params, state.extra, metrics))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, *results.values())


def test_the_first_rule_that_matches_decides(monkeypatch):
  monkeypatch.setattr(sharding, "SMALL", 1024)
  config = simclr.get_config("smoke").to_dict()
  config["mesh"] = {
    "data": 2,
    "fsdp": 4,
    "rules": (("projector/dense1", ("fsdp",)), ("projector", ())),
  }
  step = compile_step(config, chips.Topology("local"))
  found = {
    sharding.name(path): leaf.sharding.spec
    for path, leaf in jax.tree_util.tree_leaves_with_path(step.program.state.params)
  }
  assert found["projector/dense1/kernel"] == PartitionSpec("fsdp")
  assert found["projector/dense2/kernel"] == PartitionSpec()
  # The rest by the default: the largest axis.
  kernel = found["encoder/stage2_block1/conv1/kernel"]
  assert kernel == PartitionSpec(None, None, None, "fsdp")


@pytest.mark.parametrize("fsdp", [1, 4])
@pytest.mark.parametrize("name", ["v3:8x8", "v4:4x4x4", "v5e:16x16", "2xv5e:4x4"])
def test_a_host_of_a_pod_feeds_one_range_of_rows(name, fsdp):
  with tpu.compiler() as topology:
    devices = topology(name).devices
  mesh = sharding.make_mesh(data=-1, fsdp=fsdp, devices=devices)
  hosts = [d.process_index for d in mesh.devices.flat]
  changes = sum(a != b for a, b in zip(hosts, hosts[1:]))
  assert changes == len(set(hosts)) - 1
  # "fsdp" does not cross the network between slices.
  for row in mesh.devices:
    assert len({getattr(d, "slice_index", 0) for d in row}) == 1


def transformer(**kwargs):
  encoder = models.image(**kwargs)
  image = lambda batch: batch["image"].reshape(-1, 16, 16, 4)[..., :3]

  def init(rng, batch):
    return encoder.init(rng, image(batch))

  def loss(params, extra, batch, rng, step):
    y, extra = encoder.apply(params, extra, image(batch), train=True)
    return jnp.square(y - 1).mean(), (extra, Aux({}, y))

  return Method(init, loss, keep, lambda params, extra, batch: {})


def test_a_scanned_stack_is_gathered_a_layer_at_a_time(monkeypatch):
  """In both passes: whole layers are never kept."""
  monkeypatch.setattr(sharding, "SMALL", 40_000)
  depth, width = 5, 128
  with tpu.compiler() as topology:
    mesh = sharding.make_mesh(data=-1, fsdp=4, devices=topology("v5e:2x4").devices)
    method = transformer(**VIT | {"depth": depth, "width": width})
    _, step = compiled(method, mesh, rows=64)
  cost = hlo.analyse(step.as_text())
  kernels = 12 * width**2  # four of attention, two of the perceptron
  gathers = [one for one in cost.collectives if one.kind == "all-gather"]
  layers = [one for one in gathers if "/while/" in one.place]
  assert {(one.group, one.count) for one in layers} == {(4, depth)}
  # Forward and backward.
  assert sum(one.bytes for one in layers) in (2 * 2 * kernels, 2 * 4 * kernels)
  rest = [one for one in gathers if one not in layers]
  assert all(one.bytes < 4 * width**2 for one in rest)
  assert [trips for _, trips in cost.loops] == [depth, depth]
