"""Weights of other projects, in and out, as safetensors files.

`layouts` has one table of names and transposes a layout: OpenAI's CLIP and open_clip
(vision transformers and modified ResNets, SigLIP), CLIP and SigLIP of Hugging Face.
`beside` reads and writes the files that lie beside the weights, `architecture` finds
out what model the weights are of, `convert` is the command:

    python -m clj.interop.convert SOURCE TARGET [--layout=NAME]
"""

from typing import NamedTuple

import numpy as np

from clj.interop import beside, files, layouts


class Weights(NamedTuple):
  """The weights in a file of another project, as leaves of ours.

  layout: its name, a key of `layouts.LAYOUTS`.
  leaves: "params/image/encoder/block0/ln1/scale" -> array, a view of the file.
  unknown: tensors that the layout's table does not have.
  facts: what shapes do not tell, see `beside`.
  """

  layout: str
  leaves: dict[str, np.ndarray]
  unknown: dict[str, np.ndarray]
  facts: dict


def read(path) -> Weights | None:
  """Opens a safetensors file, or a directory with one; None if no layout is like it.

  Nothing but the header is read before the arrays are used. Raises ValueError, in one
  line, for what is no such file.
  """
  file = files.find(path)
  tensors = _without_prefix(files.open_tensors(file))
  openai = "input_resolution" in tensors
  tensors = {k: v for k, v in tensors.items() if not layouts.DROPPED.search(k)}
  layout = layouts.recognise(tensors)
  if layout is None:
    return None
  found, unknown = layouts.exchange(layout, tensors)
  leaves = {name: value for name, (value,) in found.items()}
  facts = beside.facts(layout, file.parent, openai)
  return Weights(layout, leaves, {name: tensors[name] for name in unknown}, facts)


def told(weights: Weights) -> str:
  """A line on what shapes do not tell: a tower that is built otherwise loads, but
  computes something else."""
  short = lambda v: tuple(round(x, 3) for x in v) if isinstance(v, tuple) else v
  towers = [
    f"{tower} {', '.join(f'{k} {short(v)}' for k, v in weights.facts[tower].items())}"
    for tower in ("image", "text")
  ]
  return f"  layout {weights.layout}; made for {'; '.join(towers)}"


def _without_prefix(tensors: dict) -> dict:
  """Without what data-parallel training and compilation put before every name."""
  for prefix in ("module.", "_orig_mod."):
    if tensors and all(name.startswith(prefix) for name in tensors):
      tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
  return tensors
