"""NCSN and NCSNv2: RefineNets with dilated convolutions.

NCSN: Song and Ermon 2019, "Generative Modeling by Estimating Gradients of the Data Distribution",
https://arxiv.org/abs/1907.05600.
NCSNv2: Song and Ermon 2020, "Improved Techniques for Training Score-Based Generative Models",
https://arxiv.org/abs/2006.09011.
"""

import dataclasses
import functools
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from models import refinenet
from models.layers import (
  Activation,
  compute_dtype,
  get_act,
  remat_policy,
  rematerialized,
  sigma_of_label,
)
from models.normalization import ConditionalInstanceNorm2dPlus, get_normalization
from models.refinenet import ncsn_conv
from models.utils import register_model
from runtime.array_types import FeatureMaps, Images, TimeLabels
from runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Stage:
  """Two residual blocks at one resolution; all widths are multiples of `nf`.

  Attributes:
    width: output channels.
    down: whether the first block halves the resolution, or with dilation only changes the width.
    dilation: of the convolutions; above 1 the resolution is kept and the receptive field grows.
    refined: output channels of the refinement of this stage.
  """

  width: int
  down: bool = True
  dilation: int = 1
  refined: int = 1


class _RefineNet(nn.Module):
  """Residual stages down, refinements back up.

  Attributes:
    image_size: height and width.
    num_channels: image channels.
    centered: whether images are scaled to [-1, 1]; if not, x in [0, 1] enters as 2 x - 1.
    sigma_min: smallest noise level, in units of the scaled data.
    sigma_max: largest noise level.
    num_scales: number of noise levels.
    nf: channels at full resolution.
    nonlinearity: activation.
    normalization: name of the normalization of the residual blocks.
    scale_by_sigma: divide the output by the noise level.
    dtype: type of its activations, 'float32' or 'bfloat16'; parameters and output are float32.
    remat: recompute the activations of a block for the gradient instead of keeping them.
    remat_policy: what is kept all the same: 'nothing', or 'products', the results of
      convolutions and attention.
  """

  image_size: int
  num_channels: int = 3
  centered: bool = False
  sigma_min: float = 0.01
  sigma_max: float = 50.0
  num_scales: int = 232
  nf: int = 128
  nonlinearity: str = 'elu'
  normalization: str = 'InstanceNorm++'
  scale_by_sigma: bool = True
  dtype: str = 'float32'
  remat: bool = False
  remat_policy: str = 'nothing'

  stages: ClassVar[tuple[Stage, ...]]

  def check(self) -> None:
    """Checks the fields before the network is used.

    Raises:
      UserError: if a name is unknown, or `image_size` cannot be halved as often as the stages do.
    """
    get_act(self.nonlinearity)
    compute_dtype(self.dtype)
    remat_policy(self.remat_policy)
    get_normalization(self.normalization)
    halvings = sum(stage.down and stage.dilation == 1 for stage in self.stages)
    if self.image_size % 2**halvings:
      raise UserError(
        f'data.image_size={self.image_size} cannot be halved {halvings} times, as this network '
        f'does: use a multiple of {2**halvings}.'
      )

  def blocks(self, act: Activation) -> tuple[functools.partial, functools.partial]:
    """The constructors of a residual block and of a refinement block."""
    norm = get_normalization(self.normalization)
    residual = rematerialized(refinenet.ResidualBlock, self.remat, self.remat_policy)
    refine = rematerialized(refinenet.RefineBlock, self.remat, self.remat_policy)
    return functools.partial(residual, act, norm=norm), functools.partial(refine, act)

  def normalize(self, x: FeatureMaps, labels: TimeLabels) -> FeatureMaps:
    """Normalizes the features `x`, (B, H, W, C), before the last convolution."""
    del labels
    return get_normalization(self.normalization)()(x)

  @nn.compact
  def __call__(self, x: Images, labels: TimeLabels, train: bool = True) -> Images:
    """Predicts the score at x_t: the last convolution, over sigma if `scale_by_sigma` is set.

    Args:
      x: x_t, (B, H, W, C), in the range of the scaled data.
      labels: indices of noise levels, (B,), in 0...num_scales-1; 0 is the largest.
      train: ignored, since the network has no dropout.

    Returns:
      An array shaped as `x`, in float32.
    """
    del train
    act = get_act(self.nonlinearity)
    residual, refine = self.blocks(act)
    labels = labels.astype(jnp.int32)
    if not self.centered:
      x = 2 * x - 1
    h = ncsn_conv(x.astype(compute_dtype(self.dtype)), self.nf)

    outputs = []
    for stage in self.stages:
      shared = {'features': stage.width * self.nf, 'dilation': stage.dilation}
      h = residual(**shared, down=stage.down)(h, labels)
      h = residual(**shared)(h, labels)
      outputs.append(h)

    h = None
    for i, stage in reversed(list(enumerate(self.stages))):
      inputs = [outputs[i]] if h is None else [outputs[i], h]
      h = refine(features=stage.refined * self.nf, end=i == 0)(inputs, labels)

    h = ncsn_conv(act(self.normalize(h, labels)), self.num_channels).astype(jnp.float32)
    if self.scale_by_sigma:
      sigma = sigma_of_label(
        labels, sigma_min=self.sigma_min, sigma_max=self.sigma_max, num_scales=self.num_scales
      )
      h = h / sigma[:, None, None, None]
    return h


_SMALL = (
  Stage(1, down=False),
  Stage(2, refined=2),
  Stage(2, dilation=2, refined=2),
  Stage(2, dilation=4, refined=2),
)


@register_model(name='ncsnv2_64')
class NCSNv2_64(_RefineNet):
  """NCSNv2 for images of 32 to 64 pixels."""

  stages: ClassVar[tuple[Stage, ...]] = _SMALL


@register_model(name='ncsnv2_128')
class NCSNv2_128(_RefineNet):
  """NCSNv2 for images of 96 to 128 pixels."""

  stages: ClassVar[tuple[Stage, ...]] = (
    Stage(1, down=False),
    Stage(2),
    Stage(2, refined=2),
    Stage(4, dilation=2, refined=2),
    Stage(4, dilation=4, refined=4),
  )


@register_model(name='ncsnv2_256')
class NCSNv2_256(_RefineNet):
  """NCSNv2 for images of 256 pixels."""

  stages: ClassVar[tuple[Stage, ...]] = (
    Stage(1, down=False),
    Stage(2),
    Stage(2, refined=2),
    Stage(2, refined=2),
    Stage(4, dilation=2, refined=2),
    Stage(4, dilation=4, refined=4),
  )


@register_model(name='ncsn')
class NCSN(_RefineNet):
  """NCSN, whose normalizations have parameters for each noise level.

  Attributes:
    num_classes: number of noise levels that it has parameters for, at least `num_scales`.
  """

  num_classes: int = 10
  scale_by_sigma: bool = False

  stages: ClassVar[tuple[Stage, ...]] = _SMALL

  def check(self) -> None:
    """Checks the fields before the network is used.

    Raises:
      UserError: as `NCSNv2_64.check`, for a normalization other than 'InstanceNorm++', or if
        `num_classes` is less than `num_scales`.
    """
    super().check()
    if self.normalization != 'InstanceNorm++':
      raise UserError(
        f'model.normalization={self.normalization!r} is not for the network ncsn, whose '
        f"normalization depends on the noise level: set it to 'InstanceNorm++'."
      )
    if self.num_classes < self.num_scales:
      raise UserError(
        f'model.num_classes={self.num_classes} is less than the number of noise levels, '
        f'model.num_scales={self.num_scales}: set it to at least that.'
      )

  def blocks(self, act: Activation) -> tuple[functools.partial, functools.partial]:
    """The constructors of a residual block and of a refinement block."""
    levels = {'num_classes': self.num_classes}
    residual = rematerialized(refinenet.ConditionalResidualBlock, self.remat, self.remat_policy)
    refine = rematerialized(refinenet.CondRefineBlock, self.remat, self.remat_policy)
    return functools.partial(residual, act, **levels), functools.partial(refine, act, **levels)

  def normalize(self, x: FeatureMaps, labels: TimeLabels) -> FeatureMaps:
    """Normalizes the features `x`, (B, H, W, C), by the noise levels numbered `labels`, (B,)."""
    return ConditionalInstanceNorm2dPlus(self.num_classes)(x, labels)
