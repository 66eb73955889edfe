"""Pictures for evaluation are those of open_clip, from the bytes of a file on."""

import io
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from clj.data import images, open_data

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "open_clip_preprocess.npz"
# In the fixture: size, crop. What open_clip calls resize_mode "shortest", "squash".
MODES = {"crop": (224, 1.0), "squash": (224, 0.0), "small": (64, 1.0)}


@pytest.mark.parametrize("mode", MODES)
def test_photographs_are_those_of_open_clip(mode):
  """60 pixels each of ten photographs, as `open_clip.transform.image_transform` of
  open_clip_torch 3.3.0, torchvision 0.29.1 and Pillow 13.0.0 gave them."""
  data_dir = os.environ.get("TFDS_DATA_DIR", "../shared/data")
  if not os.path.isdir(os.path.join(data_dir, "caltech101_subset")):
    pytest.skip("needs the photographs: caltech101_subset in TFDS_DATA_DIR")
  fixture, (size, crop) = np.load(FIXTURE), MODES[mode]
  section = {"source": "caltech101_subset", "data_dir": data_dir}
  columns = {"image": {"size": size, "eval_crop": crop}}
  split = open_data(section | {"columns": columns}).test
  records = fixture["records"].tolist()
  ((batch, _),) = split.record_batches([records], batch_size=len(records))
  rows, columns = fixture[f"{mode}_at"]
  found = batch["image"][:, 0, rows, columns].astype(int)
  difference = np.abs(found - fixture[mode])
  assert found.std() > 50 and difference.shape == (10, 60, 3)
  assert difference.max() <= 1 and difference.mean() < 0.1


@pytest.mark.parametrize(
  "shape", [(301, 250), (250, 301), (97, 203), (225, 225), (20, 20)]
)
def test_a_file_is_resized_as_pillow_and_torchvision_do(shape):
  """Resize(size) and CenterCrop(size), written out."""
  rng = np.random.default_rng(0)
  noise = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
  picture = noise.resize(shape[::-1], Image.Resampling.BICUBIC)
  file = io.BytesIO()
  picture.save(file, "jpeg", quality=95)
  decoded = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
  wide, tall = decoded.size
  for size, crop in ((224, 1.0), (224, 0.875), (64, 1.0)):
    target = {1.0: size, 0.875: 256}[crop]
    if wide <= tall:
      resized = decoded.resize((target, int(target * tall / wide)), 3)
    else:
      resized = decoded.resize((int(target * wide / tall), target), 3)
    left, top = (int(round((side - size) / 2.0)) for side in resized.size)
    expected = np.asarray(resized.crop((left, top, left + size, top + size)), int)
    found = images.crop_centrally(images.decode(file.getvalue()), size, crop)
    assert np.abs(found - expected).max() <= 1
    assert np.abs(found - expected).mean() < 0.1
