"""Every file of configs/: all variants load, `smoke` runs, evaluates and is loaded."""

import importlib
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

import clj
from clj import augment, evaluate, optim
from clj.methods import make_method
from clj.runs import log
from clj.train import train

CONFIGS = sorted(
  path.stem for path in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")
)
KEYS = {
  *("seed", "batch_size", "total_steps", "log_every", "eval_every"),
  *("checkpoint_every", "init_from", "init_rename", "profile"),
  *("method", "model", "data", "optim", "mesh", "evals"),
}


def variants(name):
  module = importlib.import_module(f"configs.{name}")
  with pytest.raises(ValueError, match="no variant 'nonsense'; there are: ") as error:
    module.get_config("nonsense")
  return module, str(error.value).partition("there are: ")[2].split(", ")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_variant_is_whole_and_can_be_built(name):
  module, names = variants(name)
  assert {"demo", "smoke"} <= set(names)
  assert module.get_config() == module.get_config("demo")
  for variant in names:
    config = module.get_config(variant)
    assert config.is_locked
    config = config.to_dict()
    assert set(config) == KEYS, variant
    json.dumps(config)
    make_method(config["method"], config["model"], config["total_steps"])
    augment.make(config["data"]["augment"])
    optim.make(
      total_steps=config["total_steps"],
      batch_size=config["batch_size"],
      **config["optim"],
    )
    assert variant in module.__doc__, f"{variant} is not in the table of the docstring"


SLOW = {"slip", "clip_distill", "siglip"}  # whose pieces the others run too
RUN = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CONFIGS]


@pytest.fixture(scope="module", params=RUN)
def smoke_run(request, tmp_path_factory):
  directory = tmp_path_factory.mktemp(request.param)
  config = importlib.import_module(f"configs.{request.param}").get_config("smoke")
  assert train(directory, **config.to_dict()) == 0
  return directory, config.to_dict()


def test_smoke_writes_what_a_run_writes(smoke_run):
  directory, config = smoke_run
  lines = log.read_metrics(directory)
  steps = [m["step"] for m in lines if "train/loss" in m]
  assert steps == list(range(1, config["total_steps"] + 1))
  assert any(key.startswith("eval/") for m in lines for key in m)
  assert {
    "train/learning_rate",
    "train/grad_norm",
    "perf/examples_per_s",
  } <= set().union(*lines)
  assert list((directory / "tensorboard").iterdir())
  assert (directory / "checkpoints" / str(config["total_steps"])).exists()


def test_evaluate_alone_gives_what_the_loop_gave(smoke_run, capsys):
  directory, config = smoke_run
  assert evaluate.main([f"--workdir={directory}"]) == 0
  out = capsys.readouterr().out
  last = log.last_values(directory, "eval/")
  for label, options in config["evals"].items():
    if options.get("name", label) in ("knn", "zeroshot"):
      value = re.search(rf"{label}/top1\s+([\d.]+)", out).group(1)
      np.testing.assert_allclose(float(value), last[f"eval/{label}/top1"], atol=6e-5)
  assert evaluate.main([f"--workdir={directory}", "--evals=nearest"]) == 1
  assert evaluate.main([f"--workdir={directory}", "--step=77"]) == 1
  assert evaluate.main([f"--workdir={directory / 'nowhere'}"]) == 1
  errors = capsys.readouterr().err.strip().splitlines()
  assert len(errors) == 3, errors
  assert "no evaluation 'nearest'" in errors[0]
  assert "no checkpoint of step 77" in errors[1]


def test_load_embeds_files_and_arrays_alike(smoke_run, tmp_path):
  directory, config = smoke_run
  model = clj.load(directory)
  picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
  Image.fromarray(picture).save(tmp_path / "one.png")
  given = [tmp_path / "one.png", picture, Image.fromarray(picture)]
  batch = model.preprocess(given)
  size = config["data"]["augment"]["image"]["size"]
  assert batch["image"].shape == (3, 1, size, size, 3)
  features = np.asarray(model.embed(model.params, model.extra, batch)["features"])
  assert np.isfinite(features).all() and features.ndim == 2
  np.testing.assert_array_equal(features[0], features[1])
  np.testing.assert_array_equal(features[0], features[2])
  if "text" in config["data"]["columns"]:
    said = model.tokenize(["a red star", "dots", "a red star"])
    found = model.embed(model.params, model.extra, batch | said)
    z = np.asarray(found["text"])
    assert z.shape == found["image"].shape and np.isfinite(z).all()
    np.testing.assert_array_equal(z[0], z[2])
    assert np.abs(z[0] - z[1]).max() > 0
  else:
    assert model.tokenize is None
  plain = augment.to_float({"image": picture[None, None, :size, :size]})
  assert plain["image"].max() <= 1
