"""The plan: what is counted in compiled programs, and what follows from it."""

import functools
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clj import losses, models, sharding
from clj.losses import contrastive
from clj.models import conv as conv_lib
from clj.planning import chips, fit, hlo, report, step
from clj.runs import log
from configs import clip, simclr
from tests import tpu


def on_cpu(function, *arguments):
  return hlo.analyse(jax.jit(function).lower(*arguments).compile().as_text())


def on_tpu(function, *arguments, topology="v5e:2x4", fsdp=1, scopes=()):
  """arguments: (shape, PartitionSpec) each, float32."""
  with tpu.compiler() as named:
    mesh = sharding.make_mesh(data=-1, fsdp=fsdp, devices=named(topology).devices)
    arguments = [
      jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
      for shape, spec in arguments
    ]
    with jax.set_mesh(mesh):
      compiled = jax.jit(function).lower(*arguments).compile()
  return hlo.analyse(compiled.as_text(), scopes)


# Counting.


def test_bytes_of_shapes():
  text = "(f32[7,5]{1,0:T(8,128)}, bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, pred[3]{0}, s4[6])"
  f32, bf16, flags, nibbles = hlo.arrays(text)
  assert [a.bytes for a in (f32, bf16, flags, nibbles)] == [140, 12, 3, 3]
  assert f32.hbm_bytes == 8 * 128 * 4  # tiles of 8 x 128 are stored whole
  assert bf16.hbm_bytes == 0  # in the chip's own memory
  assert hlo.arrays("f32[]{:T(128)}")[0].hbm_bytes == 4
  column_major = hlo.arrays("f32[300,4]{0,1:T(8,128)}")[0]
  assert column_major.hbm_bytes == 384 * 8 * 4


def brute_force(x, kernel, stride, pad, dilation):
  """Products of a convolution that meet an element of the input, counted one by one."""
  (n, size, _, _), (taps, _, inner, outer) = x, kernel
  out = (size + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
  one = sum(
    0 <= o * stride - pad + k * dilation < size for o in range(out) for k in range(taps)
  )
  return n * one**2 * inner * outer


@pytest.mark.parametrize(
  "x, kernel, stride, pad, dilation, groups",
  [
    ((2, 8, 8, 3), (3, 3, 3, 5), 1, 1, 1, 1),
    ((2, 9, 9, 4), (7, 7, 4, 6), 2, 3, 1, 1),
    ((1, 8, 8, 4), (1, 1, 4, 8), 2, 0, 1, 1),
    ((3, 10, 10, 4), (3, 3, 1, 8), 1, 2, 2, 4),
  ],
)
def test_flops_of_convolutions(x, kernel, stride, pad, dilation, groups):
  conv = partial(
    jax.lax.conv_general_dilated,
    window_strides=(stride, stride),
    padding=((pad, pad), (pad, pad)),
    rhs_dilation=(dilation, dilation),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )
  struct = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  forward = 2 * brute_force(x, kernel, stride, pad, dilation)
  assert on_cpu(conv, struct(x), struct(kernel)).flops == forward
  if groups > 1:
    return
  # Each of the gradients meets the same pairs: holes of a dilated array count nothing.
  both = jax.grad(lambda x, k: conv(x, k).sum(), (0, 1))
  assert on_cpu(both, struct(x), struct(kernel)).flops == 2 * forward


def test_flops_of_products_in_nested_loops():
  def inner(x, w):
    return jax.lax.fori_loop(0, 7, lambda i, x: jnp.tanh(x @ w), x)

  def outer(x, w):
    return jax.lax.scan(lambda x, _: (inner(x, w), None), x, None, length=5)[0]

  x = jax.ShapeDtypeStruct((8, 32), jnp.float32)
  w = jax.ShapeDtypeStruct((32, 32), jnp.float32)
  cost = on_cpu(outer, x, w)
  assert cost.flops == 2 * 8 * 32 * 32 * 35
  assert [trips for _, trips in cost.loops] == [5, 7]


def test_a_loop_without_a_trip_count_says_so():
  def until(x):
    return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ x, x)

  cost = on_cpu(until, jax.ShapeDtypeStruct((8, 8), jnp.float32))
  assert [trips for _, trips in cost.loops] == [None]
  assert cost.flops == 2 * 8**3


def test_library_calls_of_gpus():
  """Lines as XLA prints them for a GPU: products and convolutions are calls there."""
  text = """HloModule m
ENTRY %main (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  %x = bf16[2,8,8,3]{3,2,1,0} constant({...})
  %g = bf16[2,8,8,5]{3,2,1,0} constant({...})
  %w = (bf16[3,3,3,5]{3,2,1,0}, u8[1024]{0}) custom-call(%x, %g), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convBackwardFilter"
  ROOT %y = f32[8,4]{1,0} custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}
"""  # noqa: E501
  products = brute_force((2, 8, 8, 3), (3, 3, 3, 5), 1, 1, 1)
  assert hlo.analyse(text).flops == 2 * 8 * 16 * 4 + 2 * products


def test_a_slice_counts_as_a_slice_however_deep_it_is_taken():
  text = """HloModule m
%inner (p: f32[1024,128], i: s32[]) -> f32[8,128] {
  %p = f32[1024,128]{1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[8,128]{1,0:T(8,128)} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={8,128}
}
%outer (q: f32[1024,128], j: s32[]) -> f32[8,128] {
  %q = f32[1024,128]{1,0:T(8,128)} parameter(0)
  %j = s32[] parameter(1)
  %f = f32[8,128]{1,0:T(8,128)} fusion(%q, %j), kind=kLoop, calls=%inner
  ROOT %n = f32[8,128]{1,0:T(8,128)} negate(%f)
}
ENTRY %main (a: f32[1024,128], k: s32[]) -> f32[8,128] {
  %a = f32[1024,128]{1,0:T(8,128)} parameter(0)
  %k = s32[] parameter(1)
  ROOT %r = f32[8,128]{1,0:T(8,128)} fusion(%a, %k), kind=kOutput, calls=%outer
}
"""  # noqa: E501
  assert hlo.analyse(text).hbm_bytes == 2 * 8 * 128 * 4 + 4  # read, written, index


@pytest.mark.parametrize(
  "groups, first",
  [
    ("replica_groups={{0,2},{1,3}}", (0, 2)),
    ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
    ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
    ("source_target_pairs={{3,0},{0,1}}", (3, 0)),
  ],
)
def test_groups_of_collectives(groups, first):
  assert hlo._group(f", channel_id=1, {groups}, use_global_device_ids=true") == first


def layers(ws, x, scan):
  layer = lambda x, w: (jnp.tanh(x @ w), None)
  if scan:
    x, _ = jax.lax.scan(layer, x, ws)
  else:
    for i in range(len(ws)):
      x, _ = layer(x, ws[i])
  return jnp.square(x).sum()


def test_twelve_layers_scanned_and_unrolled_are_the_same_on_a_tpu():
  depth, width, rows = 12, 256, 512
  found = {}
  for scan in (True, False):
    found[scan] = on_tpu(
      jax.grad(partial(layers, scan=scan), argnums=(0, 1)),
      ((depth, width, width), P(None, None, "fsdp")),
      ((rows, width), P(("data", "fsdp"))),
      fsdp=4,
    )
  products = 3 * 2 * depth * rows * width**2 / 8
  assert found[True].flops == found[False].flops == products
  assert sorted(trips for _, trips in found[True].loops) == [depth, depth]
  moved = {
    scan: sum(c.count * c.wire for c in cost.collectives)
    for scan, cost in found.items()
  }
  assert all(moved.values())


def test_a_tower_in_chunks_costs_a_forward_pass_more_on_a_tpu():
  depth, width, rows, chunk = 4, 128, 512, 64

  def encode(ws, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

  def chunked(ws, x):
    return jnp.square(losses.encode_in_chunks(partial(encode, ws), x, chunk)).sum()

  def unrolled(ws, x):
    parts = x.reshape(chunk, rows // chunk, width).swapaxes(0, 1)
    run = jax.checkpoint(encode)
    return sum(jnp.square(run(ws, part)).sum() for part in parts)

  arguments = ((depth, width, width), P()), ((rows, width), P(("data", "fsdp")))
  cost = on_tpu(jax.grad(chunked), *arguments)
  # Forward twice, and the two gradients but that of the first layer's input.
  forward = 2 * depth * rows * width**2 / 8
  expected = 4 * forward - 2 * rows * width**2 / 8
  assert cost.flops == pytest.approx(expected, rel=0.1)
  assert cost.flops == pytest.approx(
    on_tpu(jax.grad(unrolled), *arguments).flops, rel=0.02
  )
  assert rows // chunk in [trips for _, trips in cost.loops]


# Parts.


@pytest.mark.parametrize(
  "name, part",
  [
    ("jit(train_step)/augmentation/add", "augmentation"),
    ("jit(train_step)/jvp(towers)/ResNet/conv/dot_general", "towers"),
    ("jit(train_step)/transpose(jvp(towers))/loss/while/body/mul", "loss"),
    ("jit(train_step)/transpose(jvp(loss))/towers/dot", "towers"),
    ("jit(train_step)/vmap(optimiser)", "optimiser"),
    ("jit(loss)/add", None),
    ("jit(train_step)/my_towers/lossy/add", None),
    ("", None),
  ],
)
def test_the_innermost_scope_counts(name, part):
  assert hlo.scope(name, step.SCOPES) == part


LOSSES = {
  "nt_xent": lambda x, y: losses.nt_xent(x, y, 0.1),
  "clip": lambda x, y: losses.clip(x, y, 10.0),
  "clip_ring": lambda x, y: losses.clip(x, y, 10.0, ring=True),
  "siglip": lambda x, y: losses.siglip(x, y, 10.0, -10.0),
  "barlow_twins": lambda x, y: losses.barlow_twins(x, y),
}


@pytest.mark.parametrize("chunk", [0, 64])
@pytest.mark.parametrize("name", LOSSES)
def test_both_passes_of_a_loss_are_apart_from_the_towers(name, chunk):
  """Its loops and what a `custom_vjp` runs in a `shard_map` keep their scope."""
  rows, width = 256, 128

  def encode(w, x):
    if not chunk:
      return x @ w
    return losses.encode_in_chunks(lambda x: jnp.tanh(x) @ w, x, chunk)

  @jax.named_scope("towers")
  def run(w, x, y):
    return LOSSES[name](encode(w, x), encode(w, y))

  split = (rows, width), P(("data", "fsdp"))
  arguments = ((width, width), P()), split, split
  cost = on_tpu(jax.value_and_grad(run), *arguments, scopes=step.SCOPES)
  # Of each tower, the product and its gradient; chunks are encoded twice, which the
  # compiler may leave out, for nothing reads it.
  products = 2 * rows / 8 * width**2
  towers = cost.parts["towers"].flops
  assert towers == 4 * products or (chunk and towers == 6 * products)
  assert cost.parts["loss"].flops > 0
  assert cost.parts["other"].flops == 0
  assert {one.part for one in cost.collectives} <= {"loss", "towers"}
  moved = [one.kind for one in cost.collectives if one.part == "loss"]
  assert moved or name == "barlow_twins"


def test_what_a_loss_is_called_stays():
  for name in ("nt_xent", "clip", "siglip"):
    public, plain = getattr(losses, name), getattr(contrastive, name)
    assert inspect.signature(public) == inspect.signature(plain)
    assert (public.__name__, public.__doc__) == (name, plain.__doc__)


def test_copies_belong_to_what_they_are_made_for():
  text = """HloModule m
%inner (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  ROOT %n = f32[256]{0} negate(%p), metadata={op_name="jit(f)/towers/neg"}
}
ENTRY %main (a: f32[256], b: f32[256]) -> (f32[256], f32[256]) {
  %a = f32[256]{0} parameter(0), metadata={op_name="a"}
  %b = f32[256]{0} parameter(1), metadata={op_name="b"}
  %s = (f32[256]{0:S(1)}, f32[256]{0}, u32[]{:S(2)}) copy-start(%a)
  %d = f32[256]{0:S(1)} copy-done(%s)
  %x = f32[256]{0:S(1)} fusion(%d), kind=kLoop, calls=%inner
  %c = f32[256]{0} copy(%x)
  %y = f32[256]{0} add(%b, %b), metadata={op_name="jit(f)/add"}
  ROOT %t = (f32[256]{0}, f32[256]{0}) tuple(%c, %y)
}
"""
  parts = hlo.analyse(text, ("towers",)).parts
  assert parts["towers"].hbm_bytes == 1024 + 1024  # the copies in and out
  assert parts["other"].hbm_bytes == 3 * 1024


def test_what_is_computed_again_is_not_the_model_s():
  width, rows, depth = 64, 32, 3

  def run(ws, x, remat):
    layer = lambda x, w: jnp.tanh(x @ w)
    layer = jax.checkpoint(layer) if remat else layer
    return jnp.square(jax.lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0]).sum()

  ws = jax.ShapeDtypeStruct((depth, width, width), jnp.float32)
  x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
  forward = 2 * depth * rows * width**2
  for remat in (False, True):
    both = jax.grad(partial(run, remat=remat), argnums=(0, 1))
    compiled = jax.jit(both).lower(ws, x).compile()
    assert hlo.analyse(compiled.as_text()).flops == (4 if remat else 3) * forward
    assert hlo.step_flops(compiled) == 3 * forward


# Utilisation.


@pytest.mark.parametrize(
  "platform, kind, peak",
  [
    ("tpu", "TPU v3", 61.5e12),  # a core
    ("tpu", "TPU v4", 275e12),
    ("tpu", "TPU v5 lite", 197e12),
    ("tpu", "TPU v5", 459e12),
    ("tpu", "TPU v6 lite", 918e12),
    ("tpu", "TPU v4 lite", None),
    ("gpu", "NVIDIA H100 80GB HBM3", 989e12),
    ("gpu", "NVIDIA GeForce RTX 3060", None),
  ],
)
def test_published_peaks(platform, kind, peak):
  device = types.SimpleNamespace(platform=platform, device_kind=kind)
  assert chips.peak_flops(device) == peak


def test_the_peak_of_a_cpu_is_measured_once():
  with jax.set_mesh(sharding.make_mesh()):
    peak = chips.peak_flops(jax.devices()[0])
  assert 1e8 < peak < 1e14
  assert chips.peak_flops(jax.devices()[1]) == peak


def test_a_run_tells_its_utilisation(monkeypatch, capsys, tmp_path):
  now = [100.0]
  monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
  meter = log.Meter(32, 5, 0.0, flops=3e9, peak=100e9)
  meter.start()
  now[0] += 2.0
  assert meter.mfu(13) == pytest.approx(8 * 3e9 / 2 / 100e9)  # eight steps
  assert meter.read(13)["perf/mfu"] == pytest.approx(0.12)
  now[0] += 1.0
  assert meter.read(14)["perf/mfu"] == pytest.approx(0.03)
  with_line = log.Log(tmp_path, start_step=0, total_steps=20)
  with_line.progress(13, 1.0, 128.0, True, 0.12)
  assert "128 examples/s  mfu 12 %" in capsys.readouterr().out
  for flops, peak in ((None, 1e9), (1e9, None), (None, None)):
    meter = log.Meter(32, 5, 0.0, flops=flops, peak=peak)
    assert meter.mfu(6) is None and "perf/mfu" not in meter.read(6)
  with_line.progress(14, 1.0, 128.0, True)
  assert "mfu" not in capsys.readouterr().out
  with_line.close()


def test_a_step_that_was_counted_is_not_compiled_again():
  config, _, compiled = smoke("local")
  events = []
  listen = lambda event, _, **about: events.append((event, about.get("fun_name")))
  jax.monitoring.register_event_duration_secs_listener(listen)
  with jax.set_mesh(compiled.mesh):
    program = compiled.program
    counted = program.step.lower(program.state, compiled.batch).compile()
    assert hlo.step_flops(counted) > 1e6
    state = program.init(jax.random.key(0))
    zeros = {k: np.zeros(x.shape, x.dtype) for k, x in compiled.batch.items()}
    batch = sharding.to_global(zeros, compiled.mesh)
    events.clear()
    for _ in range(3):
      with jax.transfer_guard("disallow"):
        state, _ = program.step(state, batch)
  assert int(state.step) == 3
  made = [e for e, _ in events if "backend_compile" in e or "jaxpr_to_mlir" in e]
  assert not made
  assert config["batch_size"] == len(batch["index"])


# The step.


def test_shapes_of_a_batch_follow_from_the_config():
  mesh = sharding.make_mesh()
  shapes = lambda config: {
    k: (x.shape, str(x.dtype)) for k, x in step.batch_shapes(config, mesh).items()
  }
  config = clip.get_config("smoke").to_dict()
  B = config["batch_size"]
  columns, augment = config["data"]["columns"], config["data"]["augment"]
  L = columns["text"]["length"]
  words = {
    "index": ((B,), "int32"),
    "text": ((B, L), "int32"),
    "text_mask": ((B, L), "bool"),
  }
  found = shapes(config)  # embedded: whole pictures
  assert found.items() >= words.items()
  assert found["image"] == ((B, 32, 32, 3), "uint8")
  config["data"] |= {"source": "nowhere", "data_dir": "/nowhere"}  # not there: streamed
  s = augment["image"]["size"]
  assert shapes(config)["image"] == (
    (B, augment["image"].get("views", 1), s, s, 3),
    "uint8",
  )
  more = {
    "name": "views",
    "of": "image",
    "size": 16,
    "views": 6,
    "crop_scale": (0.1, 0.3),
  }
  config["data"]["augment"] = augment | {"crops": more}
  assert shapes(config)["crops"] == ((B, 6, 16, 16, 3), "uint8")
  columns["image"]["memory_size"] = 48
  columns["label"] = {"kind": "label"}
  columns["query"] = {"kind": "text", "tokenizer": "words", "length": 9}
  found = shapes(config)
  assert found["image"] == ((B, 48, 48, 3), "uint8") and "crops" not in found
  assert found["label"] == ((B,), "int32")
  assert found["query_mask"] == ((B, 9), "bool")


@functools.cache
def smoke(where):
  """(config, topology, compiled step) of the smoke recipe."""
  config = simclr.get_config("smoke").to_dict()
  if where == "local":
    topology = chips.Topology(where)
    return config, topology, step.compile_step(config, topology)
  with tpu.compiler() as named:
    topology = named(where)
    return config, topology, step.compile_step(config, topology)


def gradient_forms(where):
  """Operations that the gradients of convolutions consist of."""
  text = smoke(where)[2].compiled.as_text()
  return set(re.findall(r"/conv\w*/cond/branch_\d_fun/([^/\"]+)", text))


def test_a_tpu_step_holds_nothing_of_the_cpu_forms():
  assert gradient_forms("v5e:2x4") == {"transpose()"}
  assert {"custom_partitioning", "nhwd,cd->nhwc"} <= gradient_forms("local")


def test_the_plan_adds_up():
  config, topology, compiled = smoke("v5e:2x4")
  found = step.examine(config, topology, compiled)
  json.dumps(found)
  memory = found["memory"]
  assert found["fits"] and found["needs"] == memory["total"] < found["hbm"]
  assert memory["total"] == sum(v for k, v in memory.items() if k != "total")
  # Pictures as bytes, an index and a label.
  assert memory["batch"] == config["batch_size"] // 8 * (32 * 32 * 3 + 4 + 4)
  parts = found["parts"]
  assert list(parts) == [*step.SCOPES, "other"]
  whole = hlo.analyse(compiled.compiled.as_text())  # counted without parts
  for key in ("flops", "hbm_bytes"):
    total = sum(one[key] for one in parts.values())
    assert total == pytest.approx(found[key]) == getattr(whole, key)
  for key in ("compute", "memory", "interconnect"):
    total = sum(one["seconds"][key] for one in parts.values())
    assert total == pytest.approx(found["seconds"][key])
  for key, one in found["collectives"].items():
    of = [
      part["collectives"][key] for part in parts.values() if key in part["collectives"]
    ]
    assert sum(x["count"] for x in of) == one["count"]
    assert sum(x["bytes"] for x in of) == one["bytes"]
  # Logits, once more in the backward pass, and the gradient: 4 rows by all 32 columns.
  width = config["method"]["projector"]["widths"][-1]
  assert parts["loss"]["flops"] == 3 * 2 * 4 * 32 * width
  assert parts["towers"]["flops"] > parts["augmentation"]["flops"] > 0
  assert parts["optimiser"]["flops"] == 0 < parts["optimiser"]["hbm_bytes"]
  assert "other" in report.describe(found, "smoke")
  times = found["seconds"]
  assert times["memory"] == found["hbm_bytes"] / 819e9
  assert found["step_s"] == [max(times.values()), sum(times.values())]
  assert found["bound"] == max(times, key=times.get)
  assert found["images_per_s"][0] == config["batch_size"] / found["step_s"][0]
  assert found["hours"][0] == config["total_steps"] * found["step_s"][0] / 3600
  for text in report.describe(found, "smoke"), report.table([found]):
    assert "v5e:2x4" in text and found["bound"] in text


def test_what_is_tried_to_make_a_step_fit(monkeypatch):
  """The order of the attempts."""
  config = simclr.get_config("smoke").to_dict()
  config |= {"batch_size": 256, "model": {"name": "vit_test", "remat": False}}
  tried = []

  def pretend(config, topology):
    tried.append(config)
    return {"fits": config["batch_size"] < 64, "needs": 2}

  monkeypatch.setattr(step, "plan", pretend)
  eight = chips.Topology("local")
  flags = [flag for flag, _ in fit.make_fit(config, eight, print)]
  assert flags == [
    "--config.model.remat=True",
    "--config.mesh.fsdp=8",
    "--config.model.remat=True --config.mesh.fsdp=8",
    "--config.batch_size=128",
    "--config.batch_size=64",
    "--config.batch_size=32",
  ]
  assert tried[2]["model"]["remat"] and tried[2]["mesh"]["fsdp"] == 8
  assert not tried[3]["model"]["remat"] and tried[3]["mesh"]["fsdp"] == 1


def test_what_the_compiler_complains_of():
  told = "Ran out of memory in memory space hbm. Used 70.02G of 15.75G hbm. Exceeded"
  assert step.needed(told) == 70.02 * 2**30
  told = (
    "total memory required for HLO temporaries (2.00T) exceeds available HBM (30.7G)"
  )
  assert step.needed(told) == 2 * 2**40
  assert step.needed("something else") is None


def test_the_plan_of_a_cpu_comes_from_its_own_compiler():
  found = step.examine(*smoke("local"))
  assert found["devices"] == 8 and found["fits"] and found["flops"] > 1e7
  assert "seconds" not in found and "no peaks" in report.describe(found, "smoke")


def ring(kind, size, group, count=1):
  return hlo.Collective(kind, size, group, tuple(range(group)), count, "")


def test_time_on_the_interconnect():
  big = 2**30
  with tpu.compiler() as topology:
    torus, grid, cores = (topology(n) for n in ("v5e:16x16", "v5e:8x8", "v3:8x8"))
    two = topology("2xv5e:16x16")
  seconds = lambda t, one: t.seconds(one, list(t.devices))
  # Every link of a torus carries its share, both ways: 4 x 50 GB/s.
  assert seconds(torus, ring("all-reduce", big, 256)) == pytest.approx(
    2 * big * 255 / 256 / 200e9
  )
  # A corner of a mesh has one link an axis.
  assert seconds(grid, ring("all-gather", big, 64)) == pytest.approx(
    big * 63 / 64 / 100e9
  )
  # The two cores of a chip send once.
  assert seconds(cores, ring("all-reduce", big, 128)) == pytest.approx(
    2 * big * 63 / 64 / 164e9
  )
  # Little data: the hops, there and back.
  assert seconds(torus, ring("all-reduce", 8, 256)) == pytest.approx(2 * 16 * 1e-6)
  # Between slices each chip sends its 256th.
  inside = seconds(torus, ring("all-reduce", big, 256))
  assert seconds(two, ring("all-reduce", big, 512)) == pytest.approx(
    inside + 2 * big / 2 / 256 / 3.125e9
  )


# The command.


def command(*arguments, **environment):
  done = subprocess.run(
    [sys.executable, "-m", "clj.plan", "--config=configs/simclr.py:smoke", *arguments],
    capture_output=True,
    text=True,
    env=os.environ | environment,
    timeout=600,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_the_command_prints_a_plan():
  code, out, err = command("--topology=v5e:2x2", "--json")
  assert code == 0, err
  found = json.loads(out)
  assert found["fits"] and found["devices"] == 4 and found["flops"] > 0
  code, out, err = command("--topology=v5e-4")
  assert code == 1 and not out and err.startswith("clj: topology 'v5e-4' is not")


@pytest.mark.parametrize("name", ["v5e-64", "v9:4x4", "v5e", "v5e:17x1", "0xv5e:2x4"])
def test_a_wrong_topology_is_named_in_one_line(name):
  with tpu.compiler() as topology, pytest.raises(ValueError, match=name) as error:
    topology(name)
  assert "\n" not in str(error.value)


def test_a_batch_that_does_not_divide_is_refused():
  config = simclr.get_config("smoke").to_dict() | {"batch_size": 12}
  with tpu.compiler() as topology, pytest.raises(ValueError, match="does not divide"):
    step.plan(config, topology("v5e:2x4"))


def test_a_missing_compiler_is_named_in_one_line(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="pip install libtpu"):
    chips.Topology("v5e:2x4")


# Closed forms of whole networks.


def resnet50_products(size, padding):
  """Multiplications of ResNet-50's forward pass for one picture, without the head.

  padding: whether those with zeros beyond the edge count, as in the usual 4.09 G.
  """

  def conv(side, taps, stride, inner, outer):
    out = -(-side // stride)
    pad = (taps - 1) // 2
    one = sum(
      padding or 0 <= o * stride - pad + k < side
      for o in range(out)
      for k in range(taps)
    )
    return one**2 * inner * outer

  total = conv(size, 7, 2, 3, 64)
  side, inner = size // 4, 64
  for stage, depth in enumerate((3, 4, 6, 3)):
    width = 64 * 2**stage
    for block in range(depth):
      stride = 2 if stage and not block else 1
      total += conv(side, 1, 1, inner, width)
      total += conv(side, 3, stride, width, width)
      if not block:
        total += conv(side, 1, stride, inner, 4 * width)
      side //= stride
      total += conv(side, 1, 1, width, 4 * width)
      inner = 4 * width
  return total


def test_the_closed_form_of_resnet50_is_the_published_one():
  # He et al. and every table since: 4.09 G with the classifier's 2.05 M.
  assert resnet50_products(224, True) + 2048 * 1000 == pytest.approx(4.09e9, rel=0.002)


@pytest.mark.slow
def test_flops_of_resnet50(monkeypatch):
  """By the CPU's compiler: a TPU's computes some products twice at a small batch."""
  monkeypatch.setattr(conv_lib, "CHANNELS", 10**9)  # without the CPU's savings
  rows = 2
  encoder = models.image("resnet50")
  x = jax.ShapeDtypeStruct((rows, 224, 224, 3), jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  params, stats = jax.eval_shape(encoder.init, key, x)
  cost = on_cpu(lambda p, s, x: encoder.apply(p, s, x, train=True), params, stats, x)
  products = resnet50_products(224, False)
  assert cost.flops == pytest.approx(2 * rows * products, rel=0.01)
  # Of the usual count 3 % meet zeros beyond the edge.
  assert products == pytest.approx(resnet50_products(224, True), rel=0.04)


def test_flops_of_vit_b16_on_a_tpu():
  """The closed form of Dosovitskiy et al., arXiv:2010.11929: 17.6 G products."""
  rows, tokens, width, depth = 8, 197, 768, 12
  encoder = models.image("vit_b16", dtype="bfloat16", scan=True)
  with tpu.compiler() as topology:
    mesh = sharding.make_mesh(devices=topology("v5e:2x2").devices)
    place = lambda a, spec: jax.ShapeDtypeStruct(
      a.shape, a.dtype, sharding=NamedSharding(mesh, spec)
    )
    x = jax.ShapeDtypeStruct((rows, 224, 224, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, stats = jax.eval_shape(encoder.init, key, x)
    params = jax.tree.map(lambda a: place(a, P()), params)
    forward = lambda p, x: encoder.apply(p, stats, x, train=True)[0]
    with jax.set_mesh(mesh):
      lowered = jax.jit(forward).lower(params, place(x, P(("data", "fsdp"))))
      cost = hlo.analyse(lowered.compile().as_text())
  layer = tokens * 12 * width**2 + 2 * tokens**2 * width
  products = (tokens - 1) * width * 16 * 16 * 3 + depth * layer
  assert products == pytest.approx(17.6e9, rel=0.005)
  assert cost.flops == pytest.approx(2 * rows / 4 * products, rel=0.01)
  assert depth in [trips for _, trips in cost.loops]
