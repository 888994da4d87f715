"""The weights that the values of the Inception network were recorded with."""

import functools

from models import inception
from tests.golden.fill import fill_inception
from tests.golden_values import load


@functools.cache
def state_dict():
  recorded = load('inception')
  shapes = (tuple(map(int, shape.strip('[]').split(','))) for shape in recorded['param_shapes'])
  names = map(str, recorded['param_names'])
  return {n: fill_inception(n, s) for n, s in zip(names, shapes, strict=True)}


@functools.cache
def params():
  return inception.params_from_torch(state_dict())
