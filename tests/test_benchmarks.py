"""The benchmark command: its count of operations, its tables, and what it refuses."""

import gzip
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import __main__ as command
from benchmarks import compare, profile, report
from runtime import flops
from runtime.errors import UserError
from tests import processes

TINY = processes.CONFIG
IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 3), 'float32')


def convolution(**settings):
  """The operations of a convolution of `IMAGE` with a kernel of 3x3 pixels and 5 features."""

  def apply(x, kernel):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    settings_ = {'window_strides': (1, 1), 'padding': 'SAME', **settings}
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **settings_)

  inputs = 3 // settings.get('feature_group_count', 1)
  features = 3 if inputs == 1 else 5
  return flops.of(apply, IMAGE, jax.ShapeDtypeStruct((3, 3, inputs, features), 'float32'))


def test_operations_of_convolutions():
  # Twice the product of: images, pixels of the result, elements of the kernel, channels in and out.
  assert convolution() == 2 * 2 * 8 * 8 * 9 * 3 * 5
  assert convolution(window_strides=(2, 2)) == 2 * 2 * 4 * 4 * 9 * 3 * 5
  assert convolution(padding='VALID') == 2 * 2 * 6 * 6 * 9 * 3 * 5
  assert convolution(padding='VALID', rhs_dilation=(2, 2)) == 2 * 2 * 4 * 4 * 9 * 3 * 5
  assert convolution(feature_group_count=3) == 2 * 2 * 8 * 8 * 9 * 1 * 3


def test_zeros_between_the_pixels_of_a_dilated_input_do_not_count():
  # Along an axis of 15 places, those of odd number are zeros. The kernel covers 1, 2, 1, 2, ...
  # pixels at the 13 places where it fits, which begin with two pixels and one zero.
  per_axis = 7 * 2 + 6 * 1
  assert convolution(padding=[(0, 0)] * 2, lhs_dilation=(2, 2)) == 2 * 2 * per_axis**2 * 3 * 5


def test_operations_of_a_dense_layer_and_of_attention():
  x, w = jnp.ones((4, 6)), jnp.ones((6, 10))
  assert flops.of(jnp.matmul, x, w) == 2 * 4 * 6 * 10

  def attention(q, k, v):
    return jnp.einsum('bij,bjc->bic', jax.nn.softmax(jnp.einsum('bic,bjc->bij', q, k)), v)

  q = jnp.ones((2, 16, 8))
  assert flops.of(attention, q, q, q) == 2 * (2 * 2 * 16 * 16 * 8)


def test_operations_inside_other_jaxprs():
  w = jnp.ones((6, 6))
  one = 2 * 4 * 6 * 6
  product = lambda x, _=None: (x @ w, None)

  @jax.custom_jvp
  def with_jvp(x):
    return x @ w

  with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), tangents[0] @ w))
  x = jnp.ones((4, 6))
  assert flops.of(jax.jit(lambda x: x @ w), x) == one
  assert flops.of(lambda x: jax.lax.scan(product, x, length=7)[0], x) == 7 * one
  assert flops.of(lambda x: jax.lax.while_loop(jnp.any, lambda x: x @ w, x), x) == one
  assert (
    flops.of(lambda x: jax.lax.cond(True, lambda x: x @ w, lambda x: x @ w @ w, x), x) == 2 * one
  )
  assert flops.of(with_jvp, x) == one
  assert flops.of(lambda x: jax.jvp(with_jvp, (x,), (x,)), x) == 2 * one
  assert flops.of(jax.checkpoint(lambda x: x @ w), x) == one
  split = jax.sharding.PartitionSpec('d')
  mesh = jax.sharding.Mesh(jax.devices()[:1], ('d',))
  assert flops.of(jax.shard_map(with_jvp, mesh=mesh, in_specs=split, out_specs=split), x) == one


def test_gradient_of_a_product_is_two_products():
  w = jnp.ones((6, 10))
  loss = lambda w, x: jnp.square(x @ w).sum()
  x = jnp.ones((4, 6))
  assert flops.of(jax.value_and_grad(loss, argnums=(0, 1)), w, x) == 3 * flops.of(loss, w, x)


def made_report(**changes):
  times = {'min': 1.0, 'lower_quartile': 1.0, 'median': 2.0, 'upper_quartile': 3.0}
  return {
    'config': 'a.py',
    'overrides': {},
    'data': 'random',
    'batch_size': 8,
    'hardware': 'a processor',
    'cores': 2,
    'devices': 2,
    'device_kind': 'cpu',
    'versions': {'jax': '1.0'},
    'parts': {'train': {'seconds': times}},
  } | changes


def times_of(median):
  times = {'min': median, 'lower_quartile': median, 'median': median, 'upper_quartile': median}
  return {'seconds': times}


def test_comparison_gives_ratios_and_tells_noise_from_change(tmp_path):
  path = tmp_path / 'old.json'
  older = made_report(parts={'train': times_of(50.0)})
  path.write_text(f'{json.dumps(older)}\n{json.dumps(made_report())}\n')
  old = compare.read(str(path))
  text = compare.compare(old, made_report(parts={'train': times_of(2.5)}))
  assert text.splitlines()[1].split() == ['train', '2', '2.5', '1.250', 'within', 'the', 'spread']
  text = compare.compare(old, made_report(parts={'train': times_of(4.0), 'forward': times_of(1.0)}))
  assert text.splitlines()[1].split() == ['train', '2', '4', '2.000']
  assert 'not in the old report' in text
  assert 'NOT THE SAME' not in text
  assert 'the old file has no b.py, only a.py' in compare.compare(old, made_report(config='b.py'))


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('hardware', 'another'),
    ('devices', 1),
    ('versions', {'jax': '2.0'}),
    ('batch_size', 16),
    ('overrides', {'model.nf': 8}),
  ],
)
def test_comparison_says_what_else_has_changed(key, value):
  text = compare.compare({'a.py': made_report()}, made_report(**{key: value}))
  assert text.startswith('NOT THE SAME CONDITIONS')
  assert f'  {key}: {made_report()[key]} before, {value} now\n' in text


def test_comparison_refuses_other_files(tmp_path):
  for content, reason in [('{"a": 1}', 'does not hold reports'), ('x', 'does not'), ('', 'empty')]:
    (tmp_path / 'file').write_text(content)
    with pytest.raises(UserError, match=reason):
      compare.read(str(tmp_path / 'file'))
  with pytest.raises(UserError, match='cannot be read'):
    compare.read(str(tmp_path / 'missing'))


def test_profile_sums_kinds_of_operations(tmp_path):
  def event(name, microseconds, **others):
    return {'name': name, 'dur': microseconds, 'args': {'hlo_op': name}} | others

  events = [
    event('dot.1', 3e6),
    event('dot.1.2', 1e6),
    event('add_fusion', 1e6),
    event('while.7', 5e6),  # contains the others
    event('thread', 9e6, args={}),
    {'name': 'process_name', 'ph': 'M'},
  ]
  with gzip.open(tmp_path / 'host.trace.json.gz', 'wt') as file:
    json.dump({'traceEvents': events}, file)
  found = profile.durations(tmp_path)
  assert found == {'dot': pytest.approx(4), 'add_fusion': pytest.approx(1)}
  assert profile.costliest(found, 1) == [('dot', pytest.approx(4), pytest.approx(0.8))]
  lines = report.profile_table(profile.costliest(found)).splitlines()
  assert [line.split()[-3:] for line in lines[1:]] == [
    ['dot', '4', '80.0%'],
    ['add_fusion', '1', '20.0%'],
  ]
  with pytest.raises(UserError, match='has no'):
    profile.durations(tmp_path / 'empty')


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    (['missing.py'], 'missing.py does not exist: name a file'),
    ([TINY, '--parts=train,foo'], "--parts has 'foo', which is not a part: choose some of train,"),
    ([TINY, '--runs=0'], '--runs=0 must be a whole number of at least 1'),
    ([TINY, '--runs=many'], '--runs=many must be a whole number'),
    ([TINY, '--batch_size=-1'], '--batch_size=-1 must be a whole number of at least 1'),
    ([TINY, '--set', 'nf=3'], "--set 'nf=3' is not section.key=value"),
    ([TINY, '--json=/missing/file'], '--json=/missing/file cannot be written'),
    ([TINY, '--compare=/missing/file'], '--compare=/missing/file cannot be read'),
    ([TINY, f'--profile={TINY}'], f'--profile={TINY} cannot be written'),
    ([TINY, '--profile=x', '--parts=forward'], 'which --parts=forward leaves out: add train'),
    ([TINY, '--data=fake'], 'invalid choice'),
    ([TINY, '--colder'], 'unrecognized arguments: --colder'),
    ([], 'CONFIG'),
  ],
)
def test_bad_input_is_refused_with_a_sentence(arguments, sentence):
  with pytest.raises(UserError, match=sentence) as raised:
    command.main(arguments)
  assert '\n' not in str(raised.value)


def test_overrides_are_values_or_strings():
  arguments = [TINY, '--batch_size=4', '--set=model.nf=8', '--set=model.dtype=bfloat16']
  (request,) = command.requests(command.parser().parse_args(arguments))
  assert request.overrides == {
    'data.dataset': 'random',
    'training.batch_size': 4,
    'model.nf': 8,
    'model.dtype': 'bfloat16',
  }


def run(*arguments):
  return subprocess.run(
    [sys.executable, '-m', 'benchmarks', *arguments],
    cwd=processes.ROOT,
    env=processes.environment(),
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
def test_mistakes_in_a_configuration_are_one_sentence():
  done = run(TINY, 'tests/conftest.py', '--set=model.widht=3', '--parts=forward')
  assert done.returncode == 1
  first, second = done.stderr.splitlines()
  assert first.startswith("Unknown config.model key 'widht'")
  assert second.startswith('tests/conftest.py has no function get_config()')


@pytest.mark.slow
def test_command_measures_every_part(tmp_path):
  path = tmp_path / 'reports.json'
  done = run(TINY, '--runs=2', f'--json={path}', f'--profile={tmp_path}', '--set=model.width=4')
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == path.read_text().strip()
  found = json.loads(path.read_text())
  assert found['overrides'] == {'model.width': 4}
  parts = found['parts']
  # Two convolutions of 28x28 pixels from 1 to 4 channels and back, and a dense layer from 16 to 4.
  forward = 2 * 16 * (2 * 28**2 * 9 * 4 + 16 * 4) / 1e9
  assert parts['forward']['GFLOP'] == pytest.approx(forward, rel=1e-3)
  assert parts['train']['GFLOP'] == pytest.approx(3 * forward, rel=1e-3)
  # Of the dense layer, which does not depend on x, there is no derivative.
  assert forward < parts['likelihood']['GFLOP'] <= 2 * forward * (1 + 1e-3)
  assert parts['sampler']['units_per_run'] == 5
  assert parts['likelihood']['units_per_run'] == 6
  for part in parts.values():
    times = part['seconds']
    assert 0 < times['min'] <= times['lower_quartile'] <= times['median'] <= times['upper_quartile']
    assert 0 < part['share_of_gemm_peak'] < 1
    assert 0 < part['compiled_MiB'] < part['resident_MiB']
    assert part['programs_from_cache'] <= part['programs'] >= 1
  assert parts['sampler']['sampler_share_of_forward'] > 0
  assert parts['likelihood']['likelihood_forwards'] > 0
  assert 0 < parts['train']['input_share_of_step'] < 1
  assert 1 <= len(found['profile']) <= 10
  assert 'operation of three training steps' in done.stdout
