"""The noise-conditional classifier against recorded values, and where its parameters come from."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import utils
from runtime.errors import UserError
from tests import golden_values as golden

SMALL = {'blocks_per_group': 1, 'channel_multiplier': 1}


@pytest.fixture(scope='module')
def fresh():
  return utils.create_classifier(jax.random.PRNGKey(0), 2, **SMALL)


def test_classifier_agrees_with_recorded_logits_and_gradient(fresh):
  recorded = golden.load('classifier')
  classifier, params = fresh
  params = golden.filled_like(params)
  leaves = golden.flatten(params)
  assert list(leaves) == recorded['param_names'].tolist()
  assert [str(list(leaf.shape)) for leaf in leaves.values()] == recorded['param_shapes'].tolist()

  x, sigmas, labels = (jnp.asarray(recorded[key]) for key in ('x', 'sigmas', 'labels'))
  logit_fn = utils.get_logit_fn(classifier, params)
  plain = utils.get_logit_fn(classifier, params, mean=(0.0,), std=(1.0,))
  golden.assert_close(jax.jit(plain)(x, sigmas), recorded['logits'], 2e-5)
  golden.assert_close(jax.jit(logit_fn)(x, sigmas), recorded['logit_fn'], 2e-5)
  grad_fn = jax.jit(utils.get_classifier_grad_fn(logit_fn))
  golden.assert_close(grad_fn(x, sigmas, labels), recorded['grad'], 1e-4)


def test_last_layer_makes_the_logits_of_the_features(fresh):
  recorded = golden.load('classifier')
  classifier, params = fresh
  params = golden.filled_like(params)
  x, sigmas = jnp.asarray(recorded['x']), jnp.asarray(recorded['sigmas'])
  features = jax.jit(lambda x: classifier.apply({'params': params}, x, sigmas, method='features'))
  last = params['Dense_2']
  golden.assert_close(features(x) @ last['kernel'] + last['bias'], recorded['logits'], 2e-5)


@pytest.mark.slow
def test_gradient_of_the_log_likelihoods_of_all_classes_cancels_under_the_posterior(fresh):
  classifier, params = fresh
  logit_fn = utils.get_logit_fn(classifier, golden.filled_like(params))
  x, sigma = jax.random.uniform(jax.random.PRNGKey(1), (1, 32, 32, 3)), jnp.ones(1)
  grad_fn = jax.jit(utils.get_classifier_grad_fn(logit_fn))
  p = jax.nn.softmax(logit_fn(x, sigma))[0]
  grads = [grad_fn(x, sigma, jnp.asarray([y])) for y in range(10)]
  mean = sum(p[y] * grad for y, grad in enumerate(grads))
  np.testing.assert_allclose(mean, 0, atol=1e-5 * max(abs(grad).max() for grad in grads))


def test_parameters_return_from_a_file_and_wrong_files_are_refused(fresh, tmp_path):
  _, params = fresh
  key, path = jax.random.PRNGKey(1), tmp_path / 'classifier'
  path.write_bytes(flax.serialization.to_bytes(params))
  _, restored = utils.create_classifier(key, 2, path, **SMALL)
  jax.tree.map(np.testing.assert_array_equal, params, restored)

  with pytest.raises(UserError, match='is not a file of parameters'):
    utils.create_classifier(key, 2, tmp_path / 'nowhere', **SMALL)
  path.write_bytes(b'nothing')
  with pytest.raises(UserError, match='is not a file of parameters'):
    utils.create_classifier(key, 2, path, **SMALL)
  path.write_bytes(flax.serialization.to_bytes(params))
  with pytest.raises(UserError, match='create it with the fields that it was trained with'):
    utils.create_classifier(key, 2, path, blocks_per_group=1, channel_multiplier=2)
  with pytest.raises(UserError, match=r"no fields \['depth'\]: choose from blocks_per_group"):
    utils.create_classifier(key, 2, depth=28)


def test_published_classifier_is_a_wide_resnet_28_10():
  like = jax.eval_shape(lambda key: utils.create_classifier(key, 1)[1], jax.random.PRNGKey(0))
  convolutions = [leaf.size for path, leaf in golden.flatten(like).items() if 'conv' in path]
  assert len(convolutions) == 25  # and three convolutional shortcuts, which have no parameters here
  assert like['Dense_2']['kernel'].shape == (640, 10)
