"""Weights of other projects -> a workdir of ours, and back.

    python -m clj.interop.convert SOURCE WORKDIR [--config=configs/clip.py:VARIANT]
    python -m clj.interop.convert SOURCE DIRECTORY --layout=hf_clip

SOURCE is a safetensors file, a directory that holds one, or a workdir. Without a layout
a workdir is written: a checkpoint of step 0, for `python -m clj.evaluate`, `clj.load`
and `init_from`; its data and evaluations are those of `--config`. With a layout the
weights are written as that project has them, with its configuration beside them. Every
array is accounted for: what has no place is refused.
"""

import copy
import json
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath

from clj import cli, interop, sharding
from clj.cli import UserError
from clj.data import text
from clj.interop import architecture, beside, files, layouts
from clj.interop.architecture import Model
from clj.interop.init_from import init_from
from clj.method import average
from clj.methods import make_method
from clj.runs import checkpoint, workdir

DTYPES = {
  "float32": np.float32,
  "float16": np.float16,
  "bfloat16": ml_dtypes.bfloat16,
}
VOCABULARIES = ("tokenizer.json", "spiece.model", "tokenizer.model")
# What an imported model's config says of data until the user does.
SECTIONS = {
  "seed": 0,
  "batch_size": 256,
  "total_steps": 1,
  "mesh": {"data": -1, "fsdp": 1},
  "evals": {"zeroshot": {}, "retrieval": {}},
  "data": {
    "source": "",
    "train_split": "train",
    "test_split": "test",
    "data_dir": "",
    "threads": 0,
    "columns": {"image": {}, "text": {"field": "caption"}, "label": {}},
    "augment": {"image": {"name": "views", "views": 1, "crop_scale": (0.9, 1.0)}},
  },
}


def read(source, *, step=None, facts=None) -> Model:
  """Opens weights of another project, or the newest checkpoint of a workdir.

  facts: "image" and "text": fields of the towers that the files do not tell.
  """
  if interop.files.is_weights(source):
    weights = interop.read(source)
    if weights is None:
      raise UserError(
        f"{source}: its tensors are named like those of no layout known here; there "
        f"are {', '.join(layouts.LAYOUTS)}"
      )
    if weights.unknown:
      raise UserError(
        f"{source}: layout {weights.layout} has no place for {len(weights.unknown)} of "
        f"its arrays, such as {min(weights.unknown)}; init_from takes the others"
      )
    for tower, known in (facts or {}).items():
      weights.facts[tower].update(known)
    return architecture.describe(weights.leaves, weights.facts)
  return _read_workdir(source, step)


def _read_workdir(directory, step) -> Model:
  from clj.evals.load import load

  loaded = load(directory, step)
  config = loaded.config
  if not {"image", "text"} <= loaded.params.keys():
    raise UserError(
      f"{directory} is of method {config['method']['name']!r}; a layout is for two "
      "towers, those of 'clip'"
    )
  params, share = loaded.params, config["method"].get("wise_ft")
  if share is not None:  # what its evaluation takes too
    params = average(loaded.extra["start"], params, share)
  trees = {"params": params, "extra": loaded.extra}
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
    name, leaf = sharding.name(path), np.asarray(leaf)
    if "/blocks/" not in name:
      leaves[name] = leaf
      continue
    for i, layer in enumerate(leaf):
      leaves[name.replace("/blocks/", f"/block{i}/")] = layer
  end = loaded.tokenizer.end[-1] if loaded.tokenizer and loaded.tokenizer.end else None
  size = loaded.columns["image"].test_spec["image"].shape[1]
  crop = config["data"]["columns"]["image"].get("eval_crop", 0.875)
  return Model(leaves, config["method"], config["model"], size, crop, end)


def write_layout(model: Model, layout: str, directory, dtype="float32") -> list[str]:
  """Writes weights and configuration as another project has them.

  Returns lines: what was written, and what of a run (queues, probes) was left out.
  Raises ValueError where the layout has no place for a part of the model, or needs one
  that the model does not have.
  """
  if layout not in layouts.LAYOUTS:
    raise UserError(f"no layout {layout!r}; there are: {', '.join(layouts.LAYOUTS)}")
  if dtype not in DTYPES:
    raise UserError(f"no dtype {dtype!r}; there are: {', '.join(DTYPES)}")
  found, left = layouts.exchange(layout, model.leaves, back=True)
  if homeless := [name for name in left if layouts.OF_MODEL.match(name)]:
    raise UserError(
      f"{layout} has no place for {len(homeless)} arrays, such as {min(homeless)}; "
      f"there are: {', '.join(layouts.LAYOUTS)}"
    )
  if missing := layouts.missing(layout, found):
    raise UserError(f"{layout} needs {missing[0]}, which this model does not have")
  directory = epath.Path(directory)
  configuration = beside.files(layout, model)
  tensors = {}
  for name, parts in found.items():
    shape = (sum(map(len, parts)), *parts[0].shape[1:]) if parts[0].ndim else ()
    join = lambda parts=parts: np.concatenate(parts) if len(parts) > 1 else parts[0]
    tensors[name] = (shape, DTYPES[dtype], join)
  name = "model" if layout.startswith("hf") else "open_clip_model"
  files.write_tensors(directory / f"{name}.safetensors", tensors)
  for name, content in configuration.items():
    (directory / name).write_text(json.dumps(content, indent=2) + "\n")
  line = f"{directory}: {len(tensors)} arrays in layout {layout}, {dtype}"
  return [line, *(f"  left out: {name}" for name in left)]


def write_workdir(
  model: Model, source, directory, sections, tokenizer=None
) -> list[str]:
  """Writes config.json, the tokenizer and a checkpoint of step 0, which evaluation
  loads. `source` is where the model's weights are; `sections` a config's.

  Returns lines on what was done.
  """
  directory = epath.Path(directory)
  if (directory / "checkpoints").exists():
    raise UserError(f"{directory} holds a run already; take another directory")
  length = len(model.leaves["params/text/position"])
  config = dict(sections) | {"method": model.method, "model": model.model}
  config["init_from"] = str(source)
  data = config["data"] = copy.deepcopy(config["data"])
  columns, augment = data["columns"], data["augment"]
  image = {"size": model.size, "eval_crop": model.crop}
  columns["image"] = columns.get("image", {}) | image
  augment["image"] = augment["image"] | {"size": model.size}
  said = columns.pop("text", {})
  lines = []
  if tokenizer is None:
    lines.append("no vocabulary: texts need one, say --tokenizer=FILE")
  else:
    section = {"tokenizer": str(tokenizer), "length": length}
    if config["method"]["loss"] == "sigmoid":  # SigLIP's rule is not in the file
      section["clean"] = "canonical"
    opened = text.open_tokenizer(**section)
    vocab = model.leaves["params/text/token"].shape[0]
    if opened.vocab_size > vocab:
      raise UserError(
        f"{tokenizer} has {opened.vocab_size} ids, the model only {vocab}: it is the "
        "vocabulary of another model"
      )
    columns["text"] = {"field": said.get("field", "text")} | section

  method = make_method(config["method"], config["model"], config["total_steps"])
  batch = {
    "image": jnp.zeros((1, 1, model.size, model.size, 3)),
    "text": jnp.zeros((1, length), jnp.int32),
    "text_mask": jnp.ones((1, length), bool),
  }
  params, extra = jax.eval_shape(lambda: method.init(jax.random.key(0), batch))
  # Split over all devices; nothing is ever whole on one, nor drawn at random first.
  mesh = sharding.make_mesh(data=1, fsdp=-1)
  struct = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
  wanted = (params, extra)
  params, extra = jax.tree.map(struct, wanted, sharding.state_shardings(wanted, mesh))
  with jax.set_mesh(mesh):
    params, extra, report = init_from(params, extra, source)
  lacking = [
    sharding.name(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path((params, extra))
    if isinstance(leaf, jax.ShapeDtypeStruct)
  ]
  if lacking:
    raise UserError(
      f"{source} lacks {len(lacking)} arrays of the model, such as {lacking[0]}"
    )
  workdir.record_config(directory, config, 0)
  clock = {"seconds": 0.0}
  if "text" in columns:
    opened.save(directory / "tokenizer")
    clock["columns"] = {"text": opened.settings}
  state = {"step": jnp.zeros((), jnp.int32), "rng": jax.random.key(0), "opt_state": ()}
  state |= {"params": params, "extra": extra}
  checkpoints = checkpoint.Checkpoints(directory)
  checkpoints.save(0, state, clock, {})
  checkpoints.close()
  lines.insert(0, report)
  lines.append(f"{directory}: checkpoint of step 0; in a config it is")
  for section in ("method", "model"):
    lines.append(f'  "{section}": {config[section]},')
  lines.append(
    f'  "data": size {model.size}, eval_crop {model.crop}, texts of {length}'
  )
  return lines


def main(argv=None) -> int:
  parser = cli.parser(
    "clj.interop.convert",
    "Converts weights between other projects and clj.\n\n--config=FILE.py[:VARIANT] "
    "and --config.key=value give a workdir its data and evaluations.",
  )
  parser.add_argument("source", help="safetensors file, directory with one, or workdir")
  parser.add_argument("target", help="a workdir, or with --layout a directory")
  parser.add_argument("--layout", help=f"one of {', '.join(layouts.LAYOUTS)}")
  parser.add_argument("--dtype", default="float32", help=f"one of {', '.join(DTYPES)}")
  parser.add_argument("--step", type=int, help="of a workdir; default: the newest")
  parser.add_argument("--tokenizer", help="a file: *.json, *.model, bpe_simple_vocab*")
  parser.add_argument("--activation", help="quick_gelu, gelu or gelu_tanh")
  parser.add_argument("--heads", help="attention heads: IMAGE,TEXT")

  def action():
    arguments, config = parser.parse_known_args(argv)
    cli.quiet_libraries()
    print("\n".join(run(config=config, **vars(arguments))))
    return 0

  return cli.guarded(action)


def run(source, target, *, layout, dtype, step, config, tokenizer, activation, heads):
  """The command; returns the lines that it prints."""
  facts = {"image": {}, "text": {}}
  if activation:
    facts = {tower: {"activation": activation} for tower in facts}
  if heads:
    for tower, count in zip(("image", "text"), heads.split(",")):
      facts[tower]["heads"] = int(count)
  model = read(source, step=step, facts=facts)
  if layout:
    return write_layout(model, layout, target, dtype) + _copy_vocabulary(source, target)
  if not files.is_weights(source):
    raise UserError(f"{source} is a workdir already; say the --layout to write")
  tokenizer = tokenizer or _vocabulary(source)
  return write_workdir(model, source, target, _sections(config), tokenizer)


def _vocabulary(source) -> epath.Path | None:
  """The vocabulary beside weights, or one in a workdir that others can read."""
  if files.is_weights(source):
    directory, names = files.find(source).parent, VOCABULARIES
  else:
    directory = epath.Path(source) / "tokenizer"
    kind = text.load(directory).kind if directory.exists() else ""
    names = {"json": VOCABULARIES[:1], "sentencepiece": VOCABULARIES[2:]}.get(kind, ())
  return next((directory / n for n in names if (directory / n).exists()), None)


def _copy_vocabulary(source, target) -> list[str]:
  if (path := _vocabulary(source)) is None:
    return ["no vocabulary was copied"]
  # transformers' name of a SentencePiece model
  name = "spiece.model" if path.suffix == ".model" else path.name
  (epath.Path(target) / name).write_bytes(path.read_bytes())
  return [f"vocabulary: {name}"]


def _sections(argv: list[str]) -> dict:
  """What a workdir's config has beside the model, from --config and --config.key."""
  if not argv:
    return SECTIONS
  config, _ = cli.read_config(argv)
  if lacking := [key for key in SECTIONS if key not in config]:
    raise UserError(f"the config has no {', '.join(lacking)}")
  return {key: config[key] for key in SECTIONS}


if __name__ == "__main__":
  sys.exit(main())
