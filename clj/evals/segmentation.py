"""Semantic segmentation: a confusion matrix, summed over images, and what it says."""

import numpy as np

from clj.cli import UserError


def confusion(prediction, target, num_classes: int, *, ignore: int = 255) -> np.ndarray:
  """Pixels by class: `[C, C]` int64, rows are the target's, columns the prediction's.

  Matrices of parts of a data set add up to that of the whole.

  Args:
    prediction, target: int, of one shape, whichever.
    ignore: pixels of this target are left out, whatever the prediction.

  Raises:
    ValueError: shapes that differ, or a class beyond `num_classes`.
  """
  prediction, target = np.asarray(prediction), np.asarray(target)
  if prediction.shape != target.shape:
    raise UserError(
      f"predictions {prediction.shape} and targets {target.shape}: give one shape"
    )
  counted = target != ignore
  prediction, target = (x[counted].astype(np.int64) for x in (prediction, target))
  for name, x in (("prediction", prediction), ("target", target)):
    if x.size and not 0 <= x.min() <= x.max() < num_classes:
      raise UserError(
        f"{name} from {x.min()} to {x.max()}, but there are {num_classes} classes"
      )
  pairs = np.bincount(num_classes * target + prediction, minlength=num_classes**2)
  return pairs.reshape(num_classes, num_classes)


def scores(confusion: np.ndarray) -> dict[str, float | np.ndarray]:
  """What is reported of a confusion matrix `[C, C]` (arXiv 1411.4038, section 5).

  Returns:
    "iou", "accuracy", "dice": `[C]`, of each class: intersection over union with the
      target, the share of the target's pixels that are right, twice the intersection
      over both sizes. NaN where the class is neither in the target nor predicted;
      accuracy also where it is not in the target.
    "miou", "mean_accuracy", "mean_dice": their means over the classes that are not NaN.
      mIoU is that of the whole data set, not a mean over images.
    "pixel_accuracy": share of all pixels that are right. "fwiou": IoU weighted by the
      target's pixels. All are NaN where there is no pixel.
  """
  right = np.diag(confusion).astype(np.float64)
  target, predicted = confusion.sum(1), confusion.sum(0)
  per_class = {
    "iou": _ratio(right, target + predicted - right),
    "accuracy": _ratio(right, target),
    "dice": _ratio(2 * right, target + predicted),
  }
  means = {"miou": "iou", "mean_accuracy": "accuracy", "mean_dice": "dice"}
  count = target.sum()
  return {
    **per_class,
    **{name: _mean(per_class[of]) for name, of in means.items()},
    "pixel_accuracy": float(_ratio(right.sum(), count)),
    "fwiou": float(_ratio(np.nansum(target * per_class["iou"]), count)),
  }


def _ratio(part, whole):
  return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _mean(values):
  values = values[~np.isnan(values)]
  return float(values.mean()) if len(values) else float("nan")
