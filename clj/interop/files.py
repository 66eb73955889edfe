"""Safetensors files, tensor by tensor: no file is ever held in memory as a whole.

A file is the length of its header (8 bytes), the header (JSON: dtype, shape and place
of each tensor) and the tensors' bytes, little-endian and row-major.
"""

import json
import math

import ml_dtypes
import numpy as np
from etils import epath

from clj.cli import UserError

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
INDEX = "model.safetensors.index.json"  # of a model that is split into several files


def is_weights(path) -> bool:
  """Whether `path` is meant as weights of another project, not as a workdir of ours."""
  path = epath.Path(path)
  if not path.is_dir():
    return path.suffix in (".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt")
  return not (path / "checkpoints").exists() and any(path.glob("*.safetensors"))


def find(path) -> epath.Path:
  """The file that holds the weights: `path` itself, or what a directory has.

  Raises ValueError, in one line, where there is no safetensors file.
  """
  path = epath.Path(path)
  if path.name.endswith((".safetensors", ".safetensors.index.json")):
    if path.exists():
      return path
    raise UserError(f"{path}: no such file")
  if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
    raise UserError(
      f"{path}: pickled weights are not read, they can run code; write them anew with "
      "safetensors.torch.save_file(state_dict, 'model.safetensors')"
    )
  if not path.is_dir():
    raise UserError(f"{path}: no such file or directory")
  if (path / INDEX).exists():
    return path / INDEX
  found = sorted(path.glob("*.safetensors"))
  names = ("model.safetensors", "open_clip_model.safetensors")
  if preferred := [f for f in found if f.name in names] or found[:1]:
    return preferred[0]
  raise UserError(f"{path}: it holds no safetensors file")


def open_tensors(path) -> dict[str, np.ndarray]:
  """Every tensor of a safetensors file, or of all files that an index names.

  The arrays are views of the file: their bytes are read when they are used (a file in a
  bucket is read at once).
  """
  path = find(path)
  if not path.name.endswith(".index.json"):
    return _open(path)
  files = sorted(set(json.loads(path.read_text())["weight_map"].values()))
  return {k: v for file in files for k, v in _open(path.parent / file).items()}


def _open(path: epath.Path) -> dict[str, np.ndarray]:
  if not path.exists():
    raise UserError(f"{path}: no such file")
  if "://" in str(path):
    data = np.frombuffer(path.read_bytes(), np.uint8)
  elif path.stat().length < 8:
    raise UserError(f"{path}: no safetensors file, it has fewer than 8 bytes")
  else:
    data = np.memmap(path, np.uint8, mode="r")
  start = 8 + int.from_bytes(bytes(data[:8]), "little")
  try:
    header = json.loads(bytes(data[8:start])) if start <= len(data) else None
  except ValueError:
    header = None
  if not isinstance(header, dict):
    raise UserError(f"{path}: no safetensors file, or one cut short")
  tensors = {}
  for name, entry in header.items():
    if name == "__metadata__":
      continue
    if entry["dtype"] not in DTYPES:
      raise UserError(
        f"{path}: {name} is of type {entry['dtype']}; known are {', '.join(DTYPES)}"
      )
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    first, last = (start + offset for offset in entry["data_offsets"])
    if last > len(data) or last - first != math.prod(shape) * dtype.itemsize:
      raise UserError(f"{path}: {name} lies outside the file, which is cut short")
    tensors[name] = data[first:last].view(dtype).reshape(shape)
  return tensors


def write_tensors(path, tensors: dict):
  """Writes a safetensors file, one tensor in memory at a time.

  tensors: name -> (shape, dtype, function without arguments that gives the array).
  """
  path = epath.Path(path)
  known = {dtype: name for name, dtype in DTYPES.items()}
  # Wide types first, as the format's own library does it, so that all are aligned.
  names = sorted(tensors, key=lambda n: (-np.dtype(tensors[n][1]).itemsize, n))
  header, offset = {"__metadata__": {"format": "pt"}}, 0
  for name in names:
    shape, dtype, _ = tensors[name]
    size = math.prod(shape) * np.dtype(dtype).itemsize
    header[name] = {
      "dtype": known[np.dtype(dtype)],
      "shape": list(shape),
      "data_offsets": [offset, offset + size],
    }
    offset += size
  head = json.dumps(header, separators=(",", ":")).encode()
  head += b" " * (-len(head) % 8)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.parent / f"{path.name}.partial"
  with partial.open("wb") as file:
    file.write(len(head).to_bytes(8, "little") + head)
    for name in names:
      shape, dtype, read = tensors[name]
      array = np.asarray(read(), dtype, order="C")
      if array.shape != tuple(shape):
        raise UserError(f"{name}: {array.shape}, not {tuple(shape)} as announced")
      file.write(array.tobytes())
  partial.replace(path)
