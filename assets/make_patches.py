"""Cuts patches from two photographs, as a folder of pictures with two classes to try things on.

  pip install scikit-learn pillow && python assets/make_patches.py <folder>

scikit-learn ships the photographs: china.jpg, a temple, and flower.jpg, 640 x 427 pixels each. A
window of 96 x 96 pixels moves over them in steps of 12, which makes 1,288 patches of each.
"""

import pathlib
import sys

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

PHOTOGRAPHS = {'flower': 'flower.jpg', 'temple': 'china.jpg'}
SIDE, STEP = 96, 12


def main(folder: pathlib.Path) -> None:
  for name, file in PHOTOGRAPHS.items():
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    windows = np.lib.stride_tricks.sliding_window_view(load_sample_image(file), (SIDE, SIDE, 3))
    for row, line in enumerate(windows[::STEP, ::STEP, 0]):
      for column, patch in enumerate(line):
        Image.fromarray(patch).save(target / f'{row:02d}_{column:02d}.png')


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
