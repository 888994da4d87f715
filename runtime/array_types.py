"""Types of arrays by their shapes; the tests check every call against them.

Axes with the same name have the same length in all arguments and the result of a call: `B` examples
of any shape `dims`, which for a network are images of `H` x `W` pixels with `C` channels.
"""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Real, UInt8

Array = jax.Array | np.ndarray

Scalar = Float[Array, '']
Flag = Bool[Array, '']
PerExample = Float[Array, 'B']  # times t, noise levels sigma, log-densities: one for each example
Batch = Float[Array, 'B *dims']  # x_t, its score, noise
TimeLabels = Real[Array, 'B']  # what a network is conditioned on: time steps or noise levels
Images = Float[Array, 'B H W C']
FeatureMaps = Float[Array, 'B H W C']  # what the layers of a network pass on
Embedding = Float[Array, 'B E']  # of a time or noise level
GreyLevels = UInt8[Array, 'B H W C']  # images in 0...255
Labels = Integer[Array, 'B']
Logits = Float[Array, 'B num_classes']
Features = Float[Array, 'N D']
RandomKey = jax.Array  # one key, typed or raw, or an array of them
Count = int | Int[Array, '']
# Between images in [0, 1] and the network's range; affine, and also for a single grey level.
Scaler = Callable[[Array | float], Array | float]
