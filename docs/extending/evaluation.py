"""An evaluation of your own: how far a checkpoint is from a weightless network.

python main.py --mode=eval --config=docs/extending/evaluation.py --workdir=runs/demo
"""

import ml_collections
import numpy as np
import optax

from configs.vp import mnist_ddpmpp_continuous
from modes import evaluations


@evaluations.register_evaluation(name='norm')
class ParameterNorm(evaluations.Evaluation):
  """The Euclidean norm of the EMA parameters, the column `norm` of the report."""

  name = 'norm'
  # Beginnings of the names of settings that the number depends on, beside those of every
  # evaluation: results of other settings are refused. This one depends on no others.
  depends_on = ()

  def path(self, number):
    return self.folder / f'ckpt_{number}_norm.npz'

  def is_done(self, number):
    """Whether the result of checkpoint `number` is there: after a kill, only the rest is done."""
    return self.path(number).exists()

  def run(self, number, state):
    """Computes it; `self.write` writes the file completely or not at all."""
    self.write(self.path(number), norm=np.asarray(optax.global_norm(state.params_ema)))

  def numbers(self, number):
    """Reads the entries of the report from the file."""
    return {'norm': float(np.load(self.path(number))['norm'])}


def get_config() -> ml_collections.ConfigDict:
  config = mnist_ddpmpp_continuous.get_config()
  config.eval.enable_norm = True
  config.eval.enable_loss = False
  return config
