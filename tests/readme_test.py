"""The README's examples are what clj takes, and run as they stand."""

import ast
import pathlib
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clj import augment, losses
from clj.augment import policies
from clj.cli import check_keywords
from clj.data import expected_spec, open_data
from clj.evals import EVALS

README = pathlib.Path(__file__).parent.parent / "README.md"


def config_block(key: str) -> dict:
  """The indented piece of a config that begins with `key`."""
  pattern = rf'^    "{key}": .*\n(?:^    .*\n)*'
  (block,) = re.findall(pattern, README.read_text(), re.MULTILINE)
  return ast.literal_eval("{" + textwrap.dedent(block) + "}")


def test_pmap_example_is_the_global_loss():
  (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
  names = {}
  exec(code, names)
  assert jax.local_device_count() == 8
  image, text = (
    losses.l2_normalize(x.reshape(-1, 16)) for x in (names["image"], names["text"])
  )
  expected = losses.clip(image, text, jnp.exp(jnp.float32(2.0)))
  np.testing.assert_allclose(names["loss"], expected, rtol=1e-6)


def test_columns_and_augmentation_give_the_shapes_it_says():
  section = {"source": "shapes", **config_block("columns"), **config_block("augment")}
  section["columns"]["image"].pop("memory_size")  # streamed: shapes without the data
  for name in ("image", "text", "label"):
    section["columns"][name].pop("field")
  section["source"] = "folder:/not/there"
  spec = expected_spec(section)
  assert spec["image"].shape == (2, 224, 224, 3)
  assert spec["crops"].shape == (8, 96, 96, 3)
  assert spec["text"].shape == spec["text_mask"].shape == (32,)
  assert spec["title"].shape == (16,)
  assert spec["label"].shape == ()
  batch = {
    key: jax.ShapeDtypeStruct((4, *each.shape), each.dtype)
    for key, each in spec.items()
  }
  made = jax.eval_shape(augment.make(section["augment"]), jax.random.key(0), batch)
  assert made["gram"].shape == (4, 2, 512, 512, 3)
  assert made["mask"].shape == (4, 2, 14**2) and made["mask"].dtype == bool


def test_a_policy_is_an_entry():
  assert "policies.byol(224)" in README.read_text()
  batch = {"image": jax.ShapeDtypeStruct((2, 30, 40, 3), np.uint8)}
  make = augment.make({"image": policies.byol(224)})
  made = jax.eval_shape(make, jax.random.key(0), batch)
  assert made["image"].shape == (2, 2, 224, 224, 3)


def test_mixture_balanced_and_subset_are_keys_of_data(tmp_path):
  given = config_block("mixture")
  assert set(given) == {"mixture", "balanced", "subset"}
  shown = given["mixture"]
  parts = [{**part, "source": "shapes", "columns": {}} for part in shown]
  assert [part.get("weight", 1.0) for part in shown] == [3.0, 1.0]
  section = {"mixture": parts, "columns": {"image": {"kind": "image", "size": 32}}}
  size = len(open_data({"source": "shapes"} | {"columns": section["columns"]}).train)
  assert len(open_data(section).train) == 2 * size
  columns = {"image": {"kind": "image", "size": 32}, "label": {"kind": "label"}}
  data = open_data(
    {"source": "shapes", "columns": columns, "subset": given["subset"]}
    | {"balanced": {"classes": 8, "each": given["balanced"]["each"]}}
  )
  batch = next(data.batches(seed=0, batch_size=32))
  assert sorted(np.unique(batch["label"], return_counts=True)[1]) == [4] * 8


def test_evaluations_and_their_options_exist():
  for label, options in config_block("evals")["evals"].items():
    own = {k: v for k, v in options.items() if k not in ("data", "final_only")}
    check_keywords(EVALS[label].run, own, label)
  table = README.read_text().partition("| evaluation |")[2].partition("\n\n")[0]
  named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", table, re.M)))
  assert sorted(named) == sorted(EVALS)


@pytest.mark.parametrize("config", sorted((README.parent / "configs").glob("*.py")))
def test_variants_of_the_results_exist(config):
  from clj.cli import load_recipe

  for variant in re.findall(rf"`{config.name}:(\w+)`", README.read_text()):
    load_recipe(f"{config}:{variant}")


def test_files_that_the_readme_names_exist():
  for path in re.findall(
    r"`?((?:clj|configs|tests|benchmarks)/[\w/.]+)", README.read_text()
  ):
    if "foo" not in path:
      assert (README.parent / path.rstrip(".")).exists(), path
