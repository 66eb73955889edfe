"""Weights of other projects: the figures that they computed, and nothing lost."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fixtures import make_interop
from safetensors.numpy import load_file, save_file

import clj
from clj import interop, losses, models
from clj.interop import architecture, convert, files, init_from, layouts
from clj.train import TrainState


def start_from(state, *arguments):
  """`init_from` on a state; returns (state, report)."""
  params, extra, report = init_from.init_from(state.params, state.extra, *arguments)
  return dataclasses.replace(state, params=params, extra=extra), report


FIXTURE = json.loads(make_interop.FIXTURE.read_text())
CASES = FIXTURE["cases"]


def weights_of(name: str) -> dict[str, np.ndarray]:
  case = CASES[name]
  drawn = {n: make_interop.draw(n, *spec) for n, spec in case["tensors"].items()}
  return drawn | {n: np.array(v) for n, v in case.get("scalars", {}).items()}


def write(directory, name: str) -> interop.Weights:
  """The directory as its authors would publish it, opened."""
  config = CASES[name]["config"]
  pixels = {"image_mean": make_interop.MEAN, "image_std": make_interop.STD}
  if name.startswith("hf"):
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "preprocessor_config.json").write_text(json.dumps(pixels))
  elif name != "openai_vit":
    (directory / "open_clip_config.json").write_text(json.dumps(config))
  save_file(weights_of(name), directory / "model.safetensors")
  weights = interop.read(directory)
  if name == "openai_vit":  # they come without a word on pixels
    facts = {"mean": make_interop.MEAN, "std": make_interop.STD}
    weights.facts["image"].update(facts)
  if name == "open_clip_siglip":  # timm's name says it, and ours is smaller
    weights.facts["image"]["heads"] = 2
  return weights


def towers(described: dict, case: dict, **kwargs):
  """Both networks, and a fresh state."""
  image = models.image(**described.model["image"] | kwargs)
  text = models.text(**described.model["text"] | kwargs)
  side = CASES[case]["size"]
  ids, mask = make_interop.texts(*(CASES[case][k] for k in ("length", "pad", "end")))

  def init(key):
    params, extra = {}, {}
    params["image"], extra["image"] = image.init(key, jnp.zeros((1, side, side, 3)))
    params["text"], extra["text"] = text.init(key, ids, mask)
    width = described.method["width"]
    for tower, features in (("image", "width"), ("text", "width")):
      head = described.method[f"{tower}_head"]
      if head != "none":
        kind = {"image": models.IMAGE, "text": models.TEXT}[tower]
        module = kind[(options := dict(described.model[tower])).pop("name")](**options)
        kernel = jnp.zeros((getattr(module, features), width))
        params[f"{tower}_head"] = {"kernel": kernel}
        if head == "affine":
          params[f"{tower}_head"]["bias"] = jnp.zeros(width)
    params["log_scale"] = jnp.zeros(())
    if described.method["loss"] == "sigmoid":
      params["bias"] = jnp.zeros(())
    return params, extra

  params, extra = jax.tree.map(
    lambda x: jnp.zeros(x.shape), jax.eval_shape(init, jax.random.key(0))
  )
  return image, text, TrainState(jnp.int32(0), jax.random.key(0), params, extra, ())


def compute(image, text, state, case: str) -> dict[str, np.ndarray]:
  """What the method computes, written out: joint space and logits."""
  params, extra = state.params, state.extra
  ids, mask = make_interop.texts(*(CASES[case][k] for k in ("length", "pad", "end")))
  pictures = make_interop.images(CASES[case]["size"])
  apply = lambda network: jax.jit(functools.partial(network.apply, train=False))
  h = {
    "image": apply(image)(params["image"], extra["image"], pictures)[0],
    "text": apply(text)(params["text"], extra["text"], ids, mask)[0],
  }
  z = {}
  for tower, features in h.items():
    head = params.get(f"{tower}_head", {})
    z[tower] = np.asarray(features)
    if "kernel" in head:
      z[tower] = z[tower] @ np.asarray(head["kernel"])
    if "bias" in head:
      z[tower] = z[tower] + np.asarray(head["bias"])
  unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in z.values()]
  logits = unit[0] @ unit[1].T * np.exp(params["log_scale"])
  return z | {"logits_per_image": logits + np.asarray(params.get("bias", 0.0))}


@pytest.mark.parametrize("case", CASES)
def test_figures_of_the_reference(case, tmp_path):
  weights = write(tmp_path, case)
  assert not weights.unknown
  described = architecture.describe(weights.leaves, weights.facts)
  # Half of them with all layers in one leaf.
  scan = {"scan": True} if case in ("hf_clip", "hf_siglip", "open_clip_vit") else {}
  image, text, state = towers(described, case, **scan)
  state, report = start_from(state, tmp_path)
  total = len(jax.tree.leaves((state.params, state.extra)))
  assert f"{total} of {total} arrays taken" in report
  assert "not used" not in report and "refused" not in report
  found = compute(image, text, state, case)
  for key in ("image", "text", "logits_per_image"):
    expected = np.array(CASES[case][key])
    assert expected.std(0).mean() > 0.05  # between the examples
    np.testing.assert_allclose(found[key], expected, atol=1e-4, rtol=0, err_msg=key)


@pytest.mark.parametrize(
  "tower, change",
  [
    ("image", {"eps": 1e-6}),
    ("image", {"activation": "gelu"}),
    ("image", {"heads": 2}),
    ("text", {"eps": 1e-6}),
    ("text", {"activation": "gelu_tanh"}),
    ("text", {"heads": 1}),
    ("text", {"causal": False}),
    ("text", {"pool": "last"}),
  ],
)
def test_figures_tell_what_shapes_do_not(tower, change, tmp_path):
  weights = write(tmp_path, "hf_clip")
  weights.facts[tower].update(change)
  described = architecture.describe(weights.leaves, weights.facts)
  image, text, state = towers(described, "hf_clip")
  state, _ = start_from(state, tmp_path)
  found = compute(image, text, state, "hf_clip")[tower]
  assert np.abs(found - np.array(CASES["hf_clip"][tower])).max() > 1e-3


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"hf_siglip2_naflex"}))
def test_round_trip_is_bit_equal(case):  # (but for one, all are written as read)
  tensors = {
    name: value
    for name, value in weights_of(case).items()
    if not layouts.DROPPED.search(name)
  }
  layout = layouts.recognise(tensors)
  leaves, unknown = layouts.exchange(layout, tensors)
  assert not unknown and all(len(parts) == 1 for parts in leaves.values())
  ours = {name: parts[0] for name, parts in leaves.items()}
  back, unknown = layouts.exchange(layout, ours, back=True)
  assert not unknown and back.keys() == tensors.keys()
  for name, parts in back.items():
    value = np.concatenate(parts) if len(parts) > 1 else parts[0]
    np.testing.assert_array_equal(value, tensors[name], err_msg=name)
    assert value.dtype == tensors[name].dtype


@pytest.mark.parametrize("key", FIXTURE["positions"])
def test_positions_are_resized_as_open_clip_does(key, tmp_path):
  tower, old, new = key.split()
  old, new = int(old), int(new)
  if tower == "image":
    table = make_interop.table(old * old + 1)
    there, here = table[1:].reshape(old, old, 2), (new, new, 2)
    expected = np.array(FIXTURE["positions"][key])[1:].reshape(here)
  else:
    there, here = make_interop.table(old), (new, 2)
    expected = np.array(FIXTURE["positions"][key])
  name = f"params/{tower}/position"
  save_file({name: there.copy()}, tmp_path / "table.safetensors")
  params = {tower: {"position": jnp.zeros(here)}}
  state = TrainState(jnp.int32(0), jax.random.key(0), params, {}, ())
  state, report = start_from(state, tmp_path / "table.safetensors")
  assert "resized (1)" in report
  found = state.params[tower]["position"]
  np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)


def test_layers_are_stacked_and_split(tmp_path):
  rng = np.random.default_rng(0)
  stacked = rng.standard_normal((3, 2, 4)).astype(np.float32)
  each = {f"params/text/encoder/block{i}/w": stacked[i] for i in range(3)}
  save_file({"params/text/encoder/blocks/w": stacked}, tmp_path / "one.safetensors")
  save_file(each, tmp_path / "each.safetensors")
  save_file(dict(list(each.items())[:2]), tmp_path / "two.safetensors")
  one = {"blocks": {"w": jnp.zeros((3, 2, 4))}}
  three = {f"block{i}": {"w": jnp.zeros((2, 4))} for i in range(3)}

  def start(encoder, file):
    params = {"text": {"encoder": encoder}}
    state = TrainState(jnp.int32(0), jax.random.key(0), params, {}, ())
    state, report = start_from(state, tmp_path / file)
    return state.params["text"]["encoder"], report

  for file in ("one.safetensors", "each.safetensors"):
    np.testing.assert_array_equal(start(one, file)[0]["blocks"]["w"], stacked)
    found = start(three, file)[0]
    np.testing.assert_array_equal([found[f"block{i}"]["w"] for i in range(3)], stacked)
  with pytest.raises(ValueError, match="none of its 2 arrays fits"):
    start(one, "two.safetensors")


def test_layers_of_another_checkpoint_on_a_mesh(tmp_path):
  from clj import sharding
  from clj.runs import checkpoint, workdir

  def state_of(scan, seed):
    text = models.text("text_test", scan=scan)
    ids = jnp.zeros((1, 4), jnp.int32)
    params, _ = text.init(jax.random.key(seed), ids, ids >= 0)
    return TrainState(jnp.int32(0), jax.random.key(0), {"text": params}, {}, ())

  mesh = sharding.make_mesh(data=2, fsdp=4)
  with jax.set_mesh(mesh):
    first = state_of(False, 0)
    workdir.record_config(tmp_path, {"model": {}}, 0)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(0, first, {}, {})
    checkpoints.close()
    state, report = start_from(state_of(True, 1), tmp_path)
    assert "kept fresh" not in report and "not used" not in report
  old, new = first.params["text"]["encoder"], state.params["text"]["encoder"]["blocks"]
  for i in range(2):
    same = jax.tree.map(lambda a, b: bool((a[i] == b).all()), new, old[f"block{i}"])  # noqa: B023
    assert all(jax.tree.leaves(same))


def test_every_array_is_accounted_for(tmp_path):
  write(tmp_path, "open_clip_vit")
  tensors = weights_of("open_clip_vit")
  tensors["visual.attn_pool.query"] = np.zeros((2, 2), np.float32)
  del tensors["ln_final.bias"]
  tensors["visual.proj"] = np.zeros((80, 7), np.float32)
  save_file(tensors, tmp_path / "model.safetensors")
  weights = interop.read(tmp_path)
  assert list(weights.unknown) == ["visual.attn_pool.query"]
  described = architecture.describe(weights.leaves, weights.facts)
  _, _, state = towers(described, "open_clip_vit")
  _, report = start_from(state, tmp_path)
  assert "kept fresh (1):\n    params/text/ln_post/bias" in report
  assert "refused (1):\n    params/image_head/kernel: (80, 7) there" in report
  assert "not used (1):\n    visual.attn_pool.query" in report
  assert (
    "made for image eps 1e-05, activation gelu, heads 4, mean (0.48, 0.46" in report
  )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_parallel_and_compiled_models(prefix, tmp_path):
  tensors = {prefix + n: v for n, v in weights_of("open_clip_vit").items()}
  save_file(tensors, tmp_path / "model.safetensors")
  weights = interop.read(tmp_path)
  assert weights.layout == "open_clip" and not weights.unknown


LARGE = ("clip_rn101", "clip_rn50x4", "clip_rn50x16", "clip_rn50x64")


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name
    for name in models.IMAGE
    if name in models.TEXT
  ],
)
def test_published_models_are_known_by_their_shapes(name):
  ids = jnp.zeros((1, 5), jnp.int32)
  facts, shapes = {}, {}
  for tower, registry in (("image", models.IMAGE), ("text", models.TEXT)):
    scan = {"scan": True} if "rn" not in name or tower == "text" else {}
    module = architecture.resolve(registry[name]())
    network = getattr(models, tower)(name, **scan)
    inputs = (jnp.zeros((1, 224, 224, 3)),) if tower == "image" else (ids, ids >= 0)
    params, _ = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    paths = jax.tree_util.tree_leaves_with_path({"params": {tower: params}})
    for path, leaf in paths:
      full = jax.tree_util.keystr(path, simple=True, separator="/")
      if "/blocks/" not in full:
        shapes[full] = leaf
        continue
      for i in range(leaf.shape[0]):
        layer = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        shapes[full.replace("/blocks/", f"/block{i}/")] = layer
    given = ("activation", "eps", "mean", "std", "causal", "pool")
    facts[tower] = {k: module[k] for k in given if k in module}
  found = architecture.describe(shapes, facts).model
  for tower, registry in (("image", models.IMAGE), ("text", models.TEXT)):
    options = dict(found[tower])
    same = registry[options.pop("name")](**options)
    assert architecture.resolve(same) == architecture.resolve(registry[name]())
    assert not options, (tower, options)


def test_shapes_do_not_tell_the_activation(tmp_path):
  save_file(weights_of("open_clip_vit"), tmp_path / "model.safetensors")
  weights = interop.read(tmp_path)
  with pytest.raises(ValueError, match="--activation=quick_gelu"):
    architecture.describe(weights.leaves, weights.facts)


def test_files_are_what_the_format_says(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {
    "b": rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
    "a": rng.standard_normal((2, 1)).astype(np.float32),
    "n": np.arange(3),
    "scalar": np.array(0.5, np.float16),
    "odd": np.arange(3, dtype=np.uint8),
  }
  lazy = {k: (v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()}
  files.write_tensors(tmp_path / "ours.safetensors", lazy)
  save_file(arrays, tmp_path / "theirs.safetensors")
  for found in (
    load_file(tmp_path / "ours.safetensors"),
    files.open_tensors(tmp_path / "theirs.safetensors"),
    files.open_tensors(tmp_path / "ours.safetensors"),
  ):
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
      np.testing.assert_array_equal(found[name], value)
      assert found[name].dtype == value.dtype and found[name].shape == value.shape


def test_files_in_parts_are_views_of_the_disk(tmp_path):
  tensors = weights_of("hf_clip")
  index = {"weight_map": {}}
  for part in range(2):
    file = f"model-{part + 1:05}-of-00002.safetensors"
    mine = dict(list(tensors.items())[part::2])
    save_file(mine, tmp_path / file)
    index["weight_map"] |= dict.fromkeys(mine, file)
  (tmp_path / files.INDEX).write_text(json.dumps(index))
  weights = interop.read(tmp_path)
  assert not weights.unknown and len(weights.leaves) == 95
  for name, value in weights.leaves.items():
    while not isinstance(value, np.memmap) and value.base is not None:
      value = value.base
    # The patches' kernel is the only copy.
    assert isinstance(value, np.memmap) or name == "params/image/patch/kernel", name


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("a.safetensors", b"", "fewer than 8 bytes"),
    ("a.safetensors", b"\xff" * 20, "no safetensors file"),
    ("a.safetensors", (50).to_bytes(8, "little") + b"{}", "cut short"),
    ("a.safetensors", (2).to_bytes(8, "little") + b"[]", "no safetensors file"),
    ("a.pt", b"PK", "safetensors.torch.save_file"),
  ],
)
def test_what_is_no_file_of_weights_is_one_line(name, content, message, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    interop.read(tmp_path / name)
  assert "\n" not in str(error.value)


def test_a_part_of_a_model_is_one_line(tmp_path):
  weights = write(tmp_path, "open_clip_vit")
  text = {n: x for n, x in weights.leaves.items() if n.startswith("params/text/")}
  with pytest.raises(ValueError, match="there is no image tower"):
    architecture.describe(text, weights.facts)
  del weights.leaves["params/text/token"]
  with pytest.raises(ValueError, match="there is no params/text/token, which"):
    architecture.describe(weights.leaves, weights.facts)
  tensors = weights_of("open_clip_vit")
  tensors["visual.positional_embedding"] = np.zeros((12, 80), np.float32)
  save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(
    ValueError, match=r"embedding has shape \(12, 80\): a table of 11"
  ):
    interop.read(tmp_path)


def test_a_file_cut_short_is_one_line(tmp_path):
  save_file({"logit_scale": np.zeros(100, np.float32)}, tmp_path / "a.safetensors")
  whole = (tmp_path / "a.safetensors").read_bytes()
  (tmp_path / "a.safetensors").write_bytes(whole[:-1])
  with pytest.raises(ValueError, match="logit_scale lies outside the file"):
    interop.read(tmp_path / "a.safetensors")
  with pytest.raises(ValueError, match="no such file"):
    interop.read(tmp_path / "b.safetensors")


def batch_of(case: str) -> dict:
  ids, mask = make_interop.texts(*(CASES[case][k] for k in ("length", "pad", "end")))
  pictures = make_interop.images(CASES[case]["size"])[:, None]
  return {"image": pictures, "text": ids, "text_mask": mask}


def logits_of(workdir, case: str) -> np.ndarray:
  loaded = clj.load(workdir)
  z = loaded.embed(loaded.params, loaded.extra, batch_of(case))
  x, y = (losses.l2_normalize(z[key]) for key in ("image", "text"))
  logits = x @ y.T * jnp.exp(loaded.params["log_scale"])
  return np.asarray(logits) + np.asarray(loaded.params.get("bias", 0.0))


@pytest.mark.parametrize("case", ["hf_clip", "hf_siglip", "open_clip_resnet"])
def test_convert_writes_a_workdir_and_gives_the_weights_back(case, tmp_path, capsys):
  layout = write(tmp_path, case).layout
  source, workdir, back = tmp_path / "model.safetensors", tmp_path / "w", tmp_path / "b"
  assert convert.main([str(source), str(workdir)]) == 0
  assert "kept fresh" not in capsys.readouterr().out
  expected = np.array(CASES[case]["logits_per_image"])
  np.testing.assert_allclose(logits_of(workdir, case), expected, atol=1e-4, rtol=0)

  assert convert.main([str(workdir), str(back), f"--layout={layout}"]) == 0
  found = files.open_tensors(back)
  tensors = {
    name: value
    for name, value in weights_of(case).items()
    if not layouts.DROPPED.search(name)
  }
  assert found.keys() == tensors.keys()
  for name, value in tensors.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)

  # What was written beside them describes the same model.
  first, second = (convert.read(path) for path in (source, back))
  assert (first.method, first.model) == (second.method, second.model)
  assert (first.size, first.crop) == (second.size, second.crop)


def test_convert_between_layouts(tmp_path):
  write(tmp_path, "open_clip_vit")
  convert.main([str(tmp_path), str(tmp_path / "hf"), "--layout=hf_clip"])
  convert.main([str(tmp_path / "hf"), str(tmp_path / "w")])
  found = logits_of(tmp_path / "w", "open_clip_vit")
  expected = np.array(CASES["open_clip_vit"]["logits_per_image"])
  np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
  arguments = [str(tmp_path / "hf"), str(tmp_path / "half"), "--layout=open_clip"]
  assert convert.main([*arguments, "--dtype=bfloat16"]) == 0
  half = files.open_tensors(tmp_path / "half")
  original = weights_of("open_clip_vit")
  assert half.keys() == original.keys()
  for name, value in original.items():
    np.testing.assert_array_equal(half[name], value.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
  "case, arguments, message",
  [
    ("hf_siglip", ["--layout=hf_clip"], "no place for 18 arrays, such as params/bias"),
    ("hf_clip", ["--layout=hf_siglip"], "hf_siglip has no place for 5 arrays"),
    ("hf_clip", ["--layout=hf"], "no layout 'hf'; there are: open_clip"),
    ("hf_clip", ["--layout=hf_clip", "--dtype=int8"], "no dtype 'int8'"),
    ("hf_siglip", ["--layout=open_clip_siglip"], "timm has no tower of width"),
    ("hf_clip", ["--config.seed=1"], "no config; give --config="),
  ],
)
def test_convert_refuses_in_one_line(case, arguments, message, tmp_path, capsys):
  write(tmp_path, case)
  assert convert.main([str(tmp_path), str(tmp_path / "out"), *arguments]) == 1
  error = capsys.readouterr().err.strip()
  assert message in error and "\n" not in error
  assert not (tmp_path / "out").exists()


def test_convert_refuses_what_it_does_not_know(tmp_path, capsys):
  write(tmp_path, "hf_clip")
  tensors = weights_of("hf_clip")
  save_file(tensors | {"vision_model.x": np.zeros(2)}, tmp_path / "model.safetensors")
  assert convert.main([str(tmp_path), str(tmp_path / "w")]) == 1
  assert "such as vision_model.x" in capsys.readouterr().err
  del tensors["text_projection.weight"]
  save_file(tensors, tmp_path / "model.safetensors")
  assert convert.main([str(tmp_path), str(tmp_path / "out"), "--layout=hf_clip"]) == 1
  assert "needs text_projection.weight" in capsys.readouterr().err


def published(case: str):
  """A model of another project, made by it, with drawn weights."""
  config = CASES[case]["config"]
  if case.startswith("hf"):
    transformers = pytest.importorskip("transformers")
    name = "Siglip" if case == "hf_siglip" else "CLIP"
    config = getattr(transformers, f"{name}Config")(**config)
    return make_interop.fill(getattr(transformers, f"{name}Model")(config))
  open_clip = pytest.importorskip("open_clip.model")
  return make_interop.fill(open_clip.CLIP(**config["model_cfg"]))


def opened(case: str, directory):
  """The directory, opened by the project that it was written for."""
  if case.startswith("hf"):
    transformers = pytest.importorskip("transformers")
    name = "SiglipModel" if case == "hf_siglip" else "CLIPModel"
    return getattr(transformers, name).from_pretrained(directory).eval()
  open_clip = pytest.importorskip("open_clip")
  return open_clip.create_model(f"local-dir:{directory}").eval()


def theirs(model, case: str) -> np.ndarray:
  import torch

  torch.set_num_threads(1)
  ids = torch.from_numpy(batch_of(case)["text"]).long()
  pixels = make_interop.pixels(CASES[case]["size"])
  with torch.no_grad():
    if case.startswith("hf"):
      return model(ids, pixels).logits_per_image.numpy()
    return model.get_logits(pixels, ids)[0].numpy()


@pytest.mark.parametrize(
  "case", ["hf_clip", "hf_clip_old", "hf_siglip", "open_clip_vit", "open_clip_resnet"]
)
@pytest.mark.filterwarnings("ignore")  # of torch and transformers
def test_live_models_in_both_directions(case, tmp_path):
  """Where PyTorch is installed: their weights here, and ours there."""
  model = published(case)
  write(tmp_path, case)  # for the files beside the weights
  state = {k: v.numpy().copy() for k, v in model.state_dict().items()}
  save_file(state, tmp_path / "model.safetensors")
  expected = theirs(model, case)
  assert convert.main([str(tmp_path), str(tmp_path / "w")]) == 0
  np.testing.assert_allclose(
    logits_of(tmp_path / "w", case), expected, atol=1e-4, rtol=0
  )
  layout = interop.read(tmp_path).layout
  arguments = [str(tmp_path / "w"), str(tmp_path / "b"), f"--layout={layout}"]
  assert convert.main(arguments) == 0
  again = theirs(opened(case, tmp_path / "b"), case)
  np.testing.assert_allclose(again, expected, atol=1e-6, rtol=0)


def vocabulary(file):
  """A tokenizer.json of 91 words, the last of which are start and end."""
  from tokenizers import Tokenizer, models, pre_tokenizers, processors

  words = ["?", "a", "red", "blue", "green", "star", "circle", "square"]
  words += [f"w{i}" for i in range(len(words), make_interop.START)] + ["<s>", "</s>"]
  made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  special = [("<s>", make_interop.START), ("</s>", make_interop.EOS)]
  made.post_processor = processors.TemplateProcessing("<s> $A </s>", None, special)
  made.save(str(file))


def test_imported_weights_are_evaluated(tmp_path, capsys):
  from clj import evaluate

  write(tmp_path, "hf_clip")
  vocabulary(tmp_path / "tokenizer.json")
  workdir = str(tmp_path / "w")
  arguments = [str(tmp_path), workdir, "--config=configs/clip.py:smoke"]
  assert convert.main(arguments) == 0
  ids = np.asarray(clj.load(workdir).tokenize("a red star")["text"])
  assert ids.tolist() == [[89, 1, 2, 5, 90, 90, 90, 90, 90]]
  capsys.readouterr()
  assert evaluate.main(["--workdir", workdir, "--evals=zeroshot,retrieval"]) == 0
  table = capsys.readouterr().out
  assert "step 0" in table and "zeroshot/top1" in table and "recall@10" in table
  assert "zeroshot/before" in table and "untrained" not in table
  assert convert.main([workdir, str(tmp_path / "b"), "--layout=open_clip"]) == 0
  original = (tmp_path / "tokenizer.json").read_bytes()
  assert (tmp_path / "b" / "tokenizer.json").read_bytes() == original


def test_imported_weights_without_data_are_one_line(tmp_path, capsys):
  from clj import evaluate

  write(tmp_path, "hf_clip")
  vocabulary(tmp_path / "tokenizer.json")
  assert convert.main([str(tmp_path), str(tmp_path / "w")]) == 0
  assert evaluate.main(["--workdir", str(tmp_path / "w")]) == 1
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert "the config names no data set" in error


def test_another_models_vocabulary_is_refused(tmp_path, capsys):
  write(tmp_path, "hf_clip")
  vocabulary(tmp_path / "tokenizer.json")
  tensors = weights_of("hf_clip")
  name = "text_model.embeddings.token_embedding.weight"
  tensors[name] = tensors[name][:90].copy()
  save_file(tensors, tmp_path / "model.safetensors")
  assert convert.main([str(tmp_path), str(tmp_path / "w")]) == 1
  assert "has 91 ids, the model only 90" in capsys.readouterr().err


def test_finetuning_starts_from_the_file_twice(tmp_path):
  from clj import sharding
  from clj.methods import make_method
  from configs import clip

  weights = write(tmp_path, "open_clip_resnet")
  described = architecture.describe(weights.leaves, weights.facts)
  recipe = clip.get_config("finetune")
  method = make_method(described.method | {"wise_ft": 0.5}, described.model, 10)
  batch = batch_of("open_clip_resnet")
  params, extra = jax.eval_shape(lambda: method.init(jax.random.key(0), batch))
  everywhere = sharding.replicated(sharding.make_mesh())
  struct = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere)
  params, extra = jax.tree.map(struct, (params, extra))
  state = TrainState(0, 0, params, extra, ())
  state, report = start_from(state, tmp_path, recipe.init_rename)
  for title in ("kept fresh", "refused", "not used"):
    assert title not in report
  start = state.extra["start"]
  assert jax.tree.structure(start) == jax.tree.structure(state.params)
  jax.tree.map(np.testing.assert_array_equal, start, state.params)
  mean = weights.leaves["extra/image/bn1/mean"]
  np.testing.assert_array_equal(state.extra["image"]["bn1"]["mean"], mean)
