"""Published augmentations, as entries of the section `data.augment` of a config.

Plain dicts, to be changed at will. Sizes are those of ImageNet by default; for pictures
of 32 pixels there is no blur, and SimCLR's jitter has strength 0.5. What PyTorch code
does with Pillow is done here as in TensorFlow's: at the same sigma the blur is another.
"""

# How far brightness, contrast, saturation and hue go.
STRONG = (0.8, 0.8, 0.8, 0.2)
WEAK = (0.4, 0.4, 0.2, 0.1)

# Pillow inverts bytes from 128 on.
PILLOW = 128 / 255


def simclr(size: int = 224, strength: float = 1.0, blur: float = 0.5) -> dict:
  """Two views alike (arXiv 2002.05709, appendix A; google-research/simclr)."""
  return {
    "name": "views",
    "size": size,
    "jitter": {"strength": strength, "amounts": STRONG},
    "grayscale": 0.2,
    "blur": {"probability": blur},
  }


def moco_v1(size: int = 224) -> dict:
  """Colour is dropped first, jitter always happens (facebookresearch/moco)."""
  return {
    "name": "views",
    "size": size,
    "crop_scale": (0.2, 1.0),
    "jitter": {"probability": 1.0, "amounts": (0.4, 0.4, 0.4, 0.4)},
    "grayscale": 0.2,
    "order": ("grayscale", "jitter", "blur", "solarize"),
  }


def moco_v2(size: int = 224) -> dict:
  """SimCLR's with less colour and fewer small crops (arXiv 2003.04297)."""
  return {
    "name": "views",
    "size": size,
    "crop_scale": (0.2, 1.0),
    "jitter": {"amounts": (0.4, 0.4, 0.4, 0.1)},
    "grayscale": 0.2,
    "blur": {"probability": 0.5},
  }


def byol(size: int = 224, crop_scale: tuple[float, float] = (0.08, 1.0)) -> dict:
  """Two views that differ: the first is always blurred (arXiv 2006.07733, appendix B).

  Also that of MoCo v3 (with crops from 0.2 for a ResNet) and Barlow Twins, but that in
  PyTorch brightness is multiplicative.
  """
  return {
    "name": "views",
    "size": size,
    "crop_scale": crop_scale,
    "jitter": {"amounts": WEAK, "brightness": "additive"},
    "grayscale": 0.2,
    "blur": {"probability": (1.0, 0.1)},
    "solarize": {"probability": (0.0, 0.2)},
  }


def swav(size: int = 224, small: int = 96, views: int = 6, of: str = "image") -> dict:
  """Two large and six small crops, of SimCLR's colours (arXiv 2006.09882).

  Returns the entries `of`, and "crops" for the small ones, of a whole section.
  """
  large = {**simclr(size), "crop_scale": (0.14, 1.0)}
  crops = {**simclr(small), "of": of, "views": views, "crop_scale": (0.05, 0.14)}
  return {of: large, "crops": crops}


def dino(
  size: int = 224,
  small: int = 96,
  views: int = 8,
  split: float = 0.4,
  of: str = "image",
) -> dict:
  """Two large crops, a pair as BYOL's, and eight small ones (arXiv 2104.14294).

  Also that of iBOT (10 small crops, `split` 0.25) and DINOv2 (`split` 0.32, small crops
  of 98 pixels for patches of 14), each with the entry `block_mask` beside it.

  Args:
    split: share of the picture's area, the least of large and the most of small crops.

  Returns the entries `of`, and "crops" for the small ones, of a whole section.
  """
  colours = {"jitter": {"amounts": WEAK}, "grayscale": 0.2}
  large = {
    "name": "views",
    "size": size,
    "crop_scale": (split, 1.0),
    **colours,
    "blur": {"probability": (1.0, 0.1)},
    "solarize": {"probability": (0.0, 0.2), "threshold": PILLOW},
  }
  crops = {
    "name": "views",
    "of": of,
    "size": small,
    "views": views,
    "crop_scale": (0.05, split),
    **colours,
    "blur": {"probability": 0.5},
  }
  return {of: large, "crops": crops}
