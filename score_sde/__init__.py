"""Trained score models in Python: `score_sde.load` opens one, and its methods draw and evaluate.

import score_sde

trained = score_sde.load('runs/demo')
images, nfe = trained.sample(16, seed=0)
"""

from score_sde.loading import load, load_config
from score_sde.trained_model import TrainedModel

__all__ = ['TrainedModel', '__version__', 'load', 'load_config']

__version__ = '1.0.0'
