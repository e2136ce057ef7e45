"""Turns colour to gray exactly as TensorFlow's ``rgb_to_grayscale``, uint8."""

import numpy as np


def rgb_to_gray(
  red: np.ndarray, green: np.ndarray, blue: np.ndarray
) -> np.ndarray:
  """Returns gray pixels, uint8, in the shape of each plane.

  Every operation is in float32 and in TensorFlow's order. Another order,
  another rounding or a fixed-point formula gives values that differ by one for
  some colours.

  Args:
    red: uint8, any shape.
    green: like `red`.
    blue: like `red`.

  Example:
    >>> planes = np.array([[255, 0], [0, 255], [0, 0]], np.uint8)
    >>> rgb_to_gray(*planes).tolist()
    [76, 149]
  """
  unit = np.float32(1 / 255)
  total = np.zeros((), np.float32)
  for plane, weight in ((red, 0.2989), (green, 0.587), (blue, 0.114)):
    total = total + plane.astype(np.float32) * unit * np.float32(weight)
  return (total * np.float32(255.5)).astype(np.uint8)
