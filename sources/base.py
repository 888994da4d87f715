"""What data sets are made of: examples, sources of them, and the registry of their names."""

import pathlib
from collections.abc import Sequence

import numpy as np

from runtime.registry import Registry

DATASETS = Registry('data set')
register_dataset = DATASETS.register

ASSETS = pathlib.Path(__file__).parent.parent / 'assets'

Example = dict[str, np.ndarray]
Source = Sequence[Example]
