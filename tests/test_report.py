"""`--mode=report`: the page says what the files say, whatever is in them, in any browser."""

import base64
import gzip
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import run_lib
from report import curves, page, pictures, reading
from report.page import Recipe
from runtime import configuration
from runtime.errors import UserError
from tests import tiny_config
from tests.processes import CONFIG, ROOT, environment

HOSTILE = '</script><img src=x onerror=alert(1)><b>'


def picture(seed, size=64, colour=True):
  shape = (size, size, 3) if colour else (size, size)
  return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def lines(**values):
  """Lines of metrics.jsonl: `name=[values]`, of the steps 10, 20, ..."""
  return ''.join(
    json.dumps({'step': 10 * i + 10, name: value}) + '\n'
    for name, series in values.items()
    for i, value in enumerate(series)
  )


def write_json(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content))


def make_run(path, *, steps=4, **settings):
  """A directory as a training, a sampling and an evaluation leave it."""
  config = tiny_config.get_config()
  config.update_from_flattened_dict(settings)
  write_json(path / 'config.json', configuration.plain(config))
  write_json(path / 'versions.json', {'python': '3.11.0', 'jax': '0.10.2'})
  start = {'time': '2026-01-02 03:04:05', 'devices': '2 x a fast one', 'processes': 3}
  start |= {'config': 'configs/mine.py', 'cpu': 'a CPU', 'cores': 7, 'memory_gib': 8.5}
  start['overrides'] = {'optim.lr': {'recipe': 0.5, 'run': 0.25}}
  write_json(path / 'start.json', start)
  falling = [1 / (i + 1) for i in range(steps)]
  text = lines(training_loss=falling, eval_loss=falling[:2], gradient_norm=falling)
  (path / 'metrics.jsonl').write_text(text)
  for i in range(steps):
    folder = path / 'samples' / f'iter_{10 * i + 10}_host_0'
    folder.mkdir(parents=True)
    picture(i, colour=False).save(folder / 'sample.png')
  folder = path / 'samples' / 'inpaint_heun_step_40_seed_7'
  for r in range(2):
    report = {'task': 'inpaint', 'method': 'heun', 'step': 40, 'seed': 7, 'round': r}
    write_json(folder / f'report_{r}.json', report | {'samples': 16, 'nfe': 23, 'seconds': 1.5})
  write_json(folder / 'settings.json', {'sampling.mask': 'right', 'sampling.task': 'inpaint'})
  picture(50).save(folder / 'grid.png')
  film = [picture(60 + i) for i in range(5)]
  film[0].save(folder / 'trajectory.gif', save_all=True, append_images=film[1:], duration=50)
  entry = {'step': 20, 'fid_pixels_1k': 12.5, 'reference': 'MINE 8 pixels', 'warnings': ['few']}
  entry |= {'floor': {'fid_pixels_1k': 0.25}, 'bpd_test': 3.5}
  later = entry | {'step': 40, 'fid_pixels_1k': 7.125}
  write_json(path / 'eval' / 'report.json', {'1': entry, '2': later})
  sampler = {'sampling.method': 'heun', 'sampling.n_steps': 12}
  write_json(path / 'eval' / 'meta.json', {'settings': {'sampling': sampler}, 'checkpoints': {}})
  return path


@pytest.fixture
def run(tmp_path):
  return make_run(tmp_path / 'run')


def render(*paths, recipe=None):
  """The text of the page, without the library that draws."""
  path = run_lib.make_report(paths, paths[0].parent / 'page.html', recipe)
  return path.read_text(encoding='utf-8').replace(curves.javascript(), '')


class Tags(html.parser.HTMLParser):
  """The tags of a page with their attributes, and the text that a reader sees."""

  def __init__(self, text):
    super().__init__()
    self.found, self.text = [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.found.append((tag, dict(attrs)))

  def handle_data(self, data):
    if self.found and self.found[-1][0] not in ('script', 'style'):
      self.text.append(data)


def words(text):
  """The text of a page on one line."""
  return ' '.join(' '.join(Tags(text).text).split())


def test_thinning_keeps_both_ends_and_every_spike():
  values = np.random.default_rng(0).normal(size=10_001)
  values[[137, 5_000]] = 90.0, -80.0
  kept = curves.thin(values, 200)
  assert len(kept) <= 200
  assert {0, 137, 5_000, 10_000} <= set(kept.tolist())
  assert (np.diff(kept) > 0).all()
  for part in np.array_split(np.arange(1, 10_000), 99):
    assert part[values[part].argmax()] in kept
    assert part[values[part].argmin()] in kept


def test_a_short_curve_is_not_thinned():
  np.testing.assert_array_equal(curves.thin(np.zeros(200), 200), np.arange(200))


def test_running_mean_is_that_of_the_values_around():
  values = np.random.default_rng(1).normal(size=50)
  expected = [values[max(i - 3, 0) : i + 4].mean() for i in range(50)]
  np.testing.assert_allclose(curves.running_mean(values, 7), expected, rtol=1e-12)


@pytest.mark.parametrize(('count', 'most'), [(1, 60), (7, 60), (100, 2), (100, 60), (61, 60)])
def test_selection_is_even_and_has_the_first_and_the_last(count, most):
  chosen = pictures.even_selection(count, most)
  assert chosen[0] == 0
  assert chosen[-1] == count - 1
  assert len(chosen) == min(count, most)
  gaps = np.diff(chosen)
  assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_page_says_what_the_files_say(run):
  text = words(render(run))
  for expected in (
    'step 40 of 40',
    'training_loss 0.25 at step 40',
    'eval_loss 0.5 at step 20',
    'Inpaint by heun step 40 seed 7 NFE 23 samples 32 seconds 3 mask right',
    'fid_pixels_1k 7.125 checkpoint 2, eval',
    'reference data MINE 8 pixels sampling.method heun sampling.n_steps 12',
    '1 20 12.5 3.5 2 40 7.125 3.5',
    'fid_pixels_1k: 1k samples, features of the mean colours of 8 x 8 blocks',
    'Split-half baseline, which perfect samples would reach: fid_pixels_1k 0.25.',
    'few',
    'Changes to configs/mine.py',
    'optim.lr 0.5 0.25',
    'model.width 8',
    'devices 2 x a fast one processes 3 CPU of the host a CPU CPU cores 7',
    'jax 0.10.2',
  ):
    assert expected.lower() in text.lower(), expected


def test_every_metric_has_a_chart_with_its_values(run):
  found = {chart.title: chart for chart in page.metric_charts(reading.read_runs([run]), 100)}
  assert list(found) == ['training_loss', 'eval_loss', 'gradient_norm']
  columns = arrays(found['training_loss'].item)
  assert [10, 20, 30, 40] in columns
  assert [1, 1 / 2, 1 / 3, 1 / 4] in columns


def arrays(item):
  """All arrays in a drawing, as lists."""
  if isinstance(item, (list, tuple)):
    return [found for part in item for found in arrays(part)]
  if not isinstance(item, dict):
    return []
  if item.get('type') == 'ndarray':
    data = base64.b64decode(item['array']['data'])
    data = gzip.decompress(data) if data[:2] == b'\x1f\x8b' else data
    return [np.frombuffer(data, item['dtype']).tolist()]
  return arrays(list(item.values()))


def test_numbers_of_checkpoints_are_drawn_over_steps(run):
  charts = page.evaluation_charts(reading.read_runs([run]), 100)
  assert [chart.title for chart in charts] == ['FID', page.protocol('bpd_test')[0]]


@pytest.mark.parametrize(
  ('name', 'title', 'says'),
  [
    ('fid_inception_50k', 'FID', '50k samples, features of the FID Inception network'),
    ('inception_score_inception_ttur_512', 'Inception score', '512 samples'),
    ('kid_mine_2k', 'KID', 'features of the extractor mine'),
    ('bpd_test', 'bpd_test', 'lower is better'),
    ('something', 'something', ''),
  ],
)
def test_protocol_is_read_from_the_name(name, title, says):
  found, about = page.protocol(name)
  assert found == title
  assert says in about


def test_a_run_in_progress_is_reported_as_far_as_it_is(run):
  with (run / 'metrics.jsonl').open('a') as file:
    file.write('no metrics\n[1]\n{"step": "1"}\n{"step": 50, "training_loss": NaN}\n')
    file.write('{"step": 60, "training_loss": 1e400}\n{"step": 70, "training_lo')
  (run / 'samples' / 'iter_20_host_0' / 'sample.png').unlink()
  (run / 'samples' / 'iter_30_host_0' / 'sample.png').write_bytes(b'half a picture')
  (run / 'samples' / 'inpaint_heun_step_40_seed_7' / 'grid.png').unlink()
  (run / 'samples' / 'inpaint_heun_step_40_seed_7' / 'trajectory.gif').write_bytes(b'GIF89a')
  (run / 'eval' / 'report.json').unlink()
  (run / 'versions.json').write_text('{"jax"')
  (run / 'start.json').unlink()
  text = words(render(run))
  for expected in (
    'training_loss 0.25 at step 40',
    'The last line of metrics.jsonl is not complete: it is left out.',
    '3 lines of metrics.jsonl are no metrics: they are left out.',
    'training_loss: 2 values are not finite and left out.',
    'No sample.png at step 20.',
    'step 30: the picture cannot be read.',
    'inpaint_heun_step_40_seed_7 has no grid.png yet: 2 rounds are done.',
    'film, 1 of 1: the picture cannot be read.',
    'eval has no report.json yet.',
    'versions.json is damaged or cannot be read',
    'start.json does not exist',
    'devices not recorded',
    'not recorded: name the recipe with --config',
  ):
    assert expected in text, expected


def test_a_run_of_almost_nothing_is_reported(tmp_path):
  path = tmp_path / 'new'
  write_json(path / 'config.json', configuration.plain(tiny_config.get_config()))
  text = words(render(path))
  assert 'no step logged yet' in text
  assert 'metrics.jsonl does not exist: nothing has been logged yet.' in text
  assert 'No samples have been drawn during training.' in text
  assert '--mode=sample has drawn nothing yet.' in text
  assert 'No evaluation has been made' in text


@pytest.mark.parametrize('content', ['{', '[1]', '', '[' * 100_000])
def test_a_damaged_configuration_is_a_note_on_the_page(content, run):
  (run / 'config.json').write_text(content)
  text = words(render(run))
  assert 'config.json' in text
  assert 'training_loss 0.25 at step 40' in text


def test_what_is_no_run_is_refused(tmp_path):
  with pytest.raises(UserError, match='is no directory: name the directory of a run'):
    run_lib.make_report([tmp_path / 'nothing'])
  with pytest.raises(UserError, match='holds no run'):
    run_lib.make_report([tmp_path])
  with pytest.raises(UserError, match='names no directory'):
    run_lib.make_report([])
  assert list(tmp_path.iterdir()) == []


def test_the_same_run_twice_is_refused(run):
  with pytest.raises(UserError, match='twice'):
    run_lib.make_report([run, run])
  with pytest.raises(UserError, match='twice'):
    run_lib.make_report([run, run / '..' / run.name])


def test_a_report_that_cannot_be_written_is_a_sentence(run):
  with pytest.raises(UserError, match='is a directory: name a file'):
    run_lib.make_report([run], run)
  with pytest.raises(UserError, match='cannot be written'):
    run_lib.make_report([run], run / 'config.json' / 'report.html')


def test_nothing_but_the_report_is_written(run):
  before = {path: path.stat().st_mtime_ns for path in run.rglob('*')}
  written = run_lib.make_report([run])
  assert written == run / 'report.html'
  after = {path: path.stat().st_mtime_ns for path in run.rglob('*')}
  assert after.keys() - before.keys() == {written}
  assert {path: after[path] for path in before if path != run} == {
    path: time for path, time in before.items() if path != run
  }


def test_hostile_strings_stay_text(tmp_path):
  name = HOSTILE.replace('/', '')  # no file is called otherwise
  run = make_run(tmp_path / name, **{'data.path': HOSTILE})
  with (run / 'metrics.jsonl').open('a') as file:
    file.write(json.dumps({'step': 10, HOSTILE: 1.0, 'text': HOSTILE}) + '\n')
  for path in run.rglob('*.json'):
    path.write_text(path.read_text().replace('heun', HOSTILE).replace('few', HOSTILE))
  write_json(run / 'versions.json', {HOSTILE: HOSTILE})
  write_json(run / 'data.json', {HOSTILE: [HOSTILE]})
  start = {'config': HOSTILE, 'overrides': {HOSTILE: {'recipe': 1, 'run': HOSTILE}}}
  write_json(run / 'start.json', start | {'time': HOSTILE, 'devices': [HOSTILE]})
  report = json.loads((run / 'eval' / 'report.json').read_text())
  write_json(run / 'eval' / 'report.json', {'1': report['1'] | {HOSTILE: 1.0}})
  text = render(run, make_run(tmp_path / 'other'))
  plain = Tags(render(*(make_run(tmp_path / side / 'a') for side in 'xy')))
  found = Tags(text)
  assert not [tag for tag, attributes in found.found if 'onerror' in attributes]
  assert {tag for tag, _ in found.found} == {tag for tag, _ in plain.found}
  assert '<img src=x' not in text
  assert words(text).count(HOSTILE) > 10


def test_several_runs_share_charts_and_show_what_differs(tmp_path):
  first = make_run(tmp_path / 'first', **{'optim.lr': 0.001})
  second = make_run(tmp_path / 'second', steps=2, **{'optim.lr': 0.002, 'model.width': 16})
  charts = page.metric_charts(reading.read_runs([first, second]), 100)
  assert [json.dumps(chart.item).count('"type":"map"') > 0 for chart in charts] == [False] * 3
  assert [json.dumps(chart.item).count('"GlyphRenderer"') for chart in charts] == [2, 2, 2]
  text = words(render(first, second))
  differing = text[text.index('What differs') : text.index('first: Changes to')]
  assert differing.split('first second')[1].split() == (
    ['model.width', '8', '16', 'optim.lr', '0.001', '0.002']
  )
  assert text.count('inpaint by heun') == 2


def test_labels_are_as_short_as_they_can_be(tmp_path):
  paths = [tmp_path / name for name in ('a/run', 'b/run', 'c')]
  assert reading.short_labels(paths) == ['a/run', 'b/run', f'{tmp_path.name}/c']
  assert reading.short_labels(paths[1:]) == ['run', 'c']


def test_a_recipe_that_is_named_is_compared_with_the_run(run):
  config = tiny_config.get_config()
  config.model.width = 32
  text = words(render(run, recipe=Recipe('mine.py', config)))
  part = text[text.index('Changes to mine.py') : text.index('All settings')]
  assert part.endswith('compared with --config. setting recipe run model.width 32 8 ')


def test_the_page_of_many_pictures_is_within_its_limit(tmp_path, monkeypatch):
  assert page.LIMIT <= 5_000_000
  run = make_run(tmp_path / 'run', steps=24)
  for i in range(24):
    picture(i, 160).save(run / 'samples' / f'iter_{10 * i + 10}_host_0' / 'sample.png')
  monkeypatch.setattr(page, 'LIMIT', len(curves.javascript().encode()) + 300_000)
  written = run_lib.make_report([run])
  assert page.LIMIT - 200_000 < written.stat().st_size <= page.LIMIT
  text = written.read_text(encoding='utf-8')
  book = re.search(r'"tracks":\[\{"label":"run".*', text)[0]
  labels = re.findall(r'"label":"step (\d+)","uri":"data:image/webp', book)
  assert 4 <= len(labels) < 24
  assert (labels[0], labels[-1]) == ('10', '240')
  assert f'run: {len(labels)} of 24 pictures are shown.' in text
  assert 'the pictures are compressed for this page' in text


def test_a_page_whose_text_is_too_long_is_refused(run, monkeypatch):
  monkeypatch.setattr(page, 'LIMIT', 100_000)
  with pytest.raises(UserError, match=r'more than 100,000: name fewer runs'):
    run_lib.make_report([run])
  assert not (run / 'report.html').exists()


def test_a_long_curve_is_thinned_and_says_so(run):
  values = np.random.default_rng(0).random(9_000)
  (run / 'metrics.jsonl').write_text(lines(training_loss=values.tolist()))
  text = words(render(run))
  assert 'run: 2,000 of 9,000 points are drawn, the smallest and the largest of each bin.' in text
  assert 'the bold line is the mean of 451 points' in text


def test_pictures_that_fit_keep_their_pixels(run):
  series = pictures.Series(('a',), (run / 'samples' / 'iter_10_host_0' / 'sample.png',))
  (stored,) = pictures.store([series], 1_000_000)
  data = base64.b64decode(stored.frames[0].uri.partition(',')[2])
  with Image.open(io.BytesIO(data)) as image:
    np.testing.assert_array_equal(np.asarray(image.convert('L')), picture(0, colour=False))
  assert stored.lossless


def test_steps_per_second_come_from_the_metrics_or_else_from_the_log(run):
  log = ''.join(
    f'2026-01-01 00:00:{second:02d},500 INFO step: {step}, training_loss: 1.0e-01\n'
    for step, second in ((10, 0), (20, 2), (30, 4), (40, 34), (50, 36))
  )
  (run / 'stdout.txt').write_text(log)
  assert reading.read_run(run, 'run').speed == (5.0, 'median between two lines of stdout.txt')
  with (run / 'metrics.jsonl').open('a') as file:
    file.write(lines(images_per_second=[32.0, 64.0, 48.0]))
  assert reading.read_run(run, 'run').speed[0] == 48.0 / 16


def command(*arguments):
  process = subprocess.run(
    [sys.executable, 'main.py', *map(str, arguments)],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=300,
  )
  return process.returncode, process.stdout + process.stderr


def test_a_training_records_its_recipe_and_machine_and_main_writes_the_report(tmp_path):
  run = tmp_path / 'trained'
  changes = {'training.n_iters': 2, 'training.snapshot_sampling': False, 'model.width': 16}
  overrides = [f'--config.{name}={value}' for name, value in changes.items()]
  code, output = command('--mode=train', f'--config={CONFIG}', f'--workdir={run}', *overrides)
  assert code == 0, output
  start = json.loads((run / 'start.json').read_text())
  assert start['config'] == str(CONFIG)
  recipes = configuration.flatten(tiny_config.get_config())
  assert start['overrides'] == {
    name: {'recipe': recipes.get(name, True), 'run': value} for name, value in changes.items()
  }
  assert start['processes'] == 1
  assert start['devices'].endswith('x cpu')
  assert start['cores'] >= 1
  other = make_run(tmp_path / 'other')
  target = tmp_path / 'pages' / 'page.html'
  code, output = command('--mode=report', f'--workdir={run},{other}', f'--report={target}')
  assert code == 0, output
  assert f'{target}: ' in output
  text = words(target.read_text(encoding='utf-8').replace(curves.javascript(), ''))
  assert 'model.width 8 16' in text
  assert 'training.snapshot_sampling True False' in text


def test_main_says_what_is_missing(tmp_path):
  code, output = command('--mode=report', f'--workdir={tmp_path}')
  assert code == 1
  assert 'UserError' in output
  assert 'holds no run' in output
  assert 'Traceback' not in output
  code, output = command('--mode=train', f'--workdir={tmp_path}')
  assert code == 1
  assert '--config must name a configuration file' in output


def test_the_report_needs_no_jax():
  program = 'import sys, modes.report; print(sorted({"jax", "flax"} & set(sys.modules)))'
  found = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
  assert found.stdout.strip() == '[]', found.stderr


# In a browser.

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')


@pytest.fixture(scope='module')
def browser():
  """A browser without a window; a missing one is an error in continuous integration only."""
  program = next(filter(None, map(shutil.which, NAMES)), None)
  if program is None and not os.environ.get('CI'):
    pytest.skip('no Chromium on this machine')
  assert program, f'CI is set, but none of {", ".join(NAMES)} is installed'
  from playwright.sync_api import sync_playwright

  with sync_playwright() as playwright:
    launched = playwright.chromium.launch(executable_path=program, args=['--no-sandbox'])
    yield launched
    launched.close()


@pytest.fixture(scope='module')
def report_of_two(tmp_path_factory):
  folder = tmp_path_factory.mktemp('browser')
  first = make_run(folder / HOSTILE.replace('/', ''), **{'data.path': HOSTILE})
  second = make_run(folder / 'second', steps=3, **{'optim.lr': 0.5})
  with (first / 'metrics.jsonl').open('a') as file:
    file.write(json.dumps({'step': 10, '$$x$$ ' + HOSTILE: 1.0}) + '\n')
  return run_lib.make_report([first, second], folder / 'report.html')


@pytest.fixture
def opened(browser, report_of_two, request):
  """The report in a window; what it must not do is checked at the end."""
  options = getattr(request, 'param', {})
  context = browser.new_context(**{'viewport': {'width': 1280, 'height': 900}} | options)
  context.set_default_timeout(120_000)  # the machine may have better things to do
  tab = context.new_page()
  wrong = []
  tab.on('console', lambda m: wrong.append(m.text) if m.type == 'error' else None)
  tab.on('pageerror', lambda error: wrong.append(str(error)))
  tab.on('dialog', lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
  address = report_of_two.as_uri()
  fetched = lambda r: wrong.append(r.url) if not r.url.startswith((address, 'data:')) else None
  tab.on('request', fetched)
  tab.goto(address)
  tab.wait_for_function('document.documentElement.dataset.drawn > 0')
  yield tab
  context.close()
  assert wrong == []


# The pixels of the first chart that are nearly of a colour.
COUNT = """colour => {
  const host = document.querySelector('.plot'), found = [];
  const visit = (node) => {
    if (node.tagName === 'CANVAS') found.push(node);
    for (const child of [...node.children, ...(node.shadowRoot?.children ?? [])]) visit(child);
  };
  visit(host);
  let count = 0;
  for (const canvas of found) {
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < data.length; i += 4) {
      const near = colour.every((value, c) => Math.abs(data[i + c] - value) < 12);
      count += near && data[i + 3] > 200;
    }
  }
  return count;
}"""


def rgb(text):
  return [int(text[i : i + 2], 16) for i in (1, 3, 5)]


def test_curves_are_drawn_and_the_legend_hides_them(opened):
  charts = int(opened.evaluate('document.documentElement.dataset.drawn'))
  assert charts == 6  # four metrics and two numbers of the evaluations
  blue, orange = map(rgb, curves.COLOURS[:2])
  assert opened.evaluate(COUNT, blue) > 50
  assert opened.evaluate(COUNT, orange) > 50
  opened.locator('.legend button').first.click()
  opened.wait_for_function(f'({COUNT})({blue}) === 0')
  assert opened.evaluate(COUNT, orange) > 50


def test_values_are_shown_on_hover_as_text(opened):
  box = opened.locator('.plot').first.bounding_box()
  opened.mouse.move(box['x'] + box['width'] / 2, box['y'] + box['height'] / 2)
  tip = opened.locator('.bk-tooltip-content').first
  tip.wait_for(state='visible')
  shown = ' '.join(tip.inner_text().split())
  assert re.search(r'0\.\d+ step \d+ . ' + re.escape(HOSTILE.replace('/', '')), shown), shown
  assert tip.locator('img').count() == 0


def test_dragging_zooms_into_all_curves_and_reset_undoes_it(opened):
  ranges = lambda: opened.evaluate('plots.map(p => [p.x_range.start, p.x_range.end])')
  start = ranges()
  box = opened.locator('.plot').first.bounding_box()
  middle = box['y'] + box['height'] / 2
  opened.mouse.move(box['x'] + 0.4 * box['width'], middle)
  opened.mouse.down()
  opened.mouse.move(box['x'] + 0.7 * box['width'], middle + 4, steps=5)
  opened.mouse.up()
  opened.wait_for_function(f'plots[0].x_range.start > {start[0][0]}')
  zoomed = ranges()
  assert start[0][0] < zoomed[0][0] < zoomed[0][1] < start[0][1]
  assert zoomed[1:4] == [zoomed[0]] * 3
  assert zoomed[4:] == start[4:]  # the evaluations have axes of their own
  opened.evaluate('plots[0].reset.emit()')
  opened.wait_for_function(f'plots[3].x_range.start === {start[0][0]}')


def test_the_slider_moves_the_pictures_of_both_runs(opened):
  book = opened.locator('#training-samples [data-flipbook]')
  images, slider = book.locator('img'), book.locator('input')
  sources = lambda: [images.nth(i).get_attribute('src')[:4000] for i in range(2)]
  assert book.locator('output').inner_text() == 'step 40'
  last = sources()
  slider.focus()
  opened.keyboard.press('ArrowLeft')
  assert book.locator('output').inner_text() == 'step 30'
  before = sources()
  assert before[0] != last[0]
  assert before[1] == last[1]  # the second run ended at step 30
  opened.keyboard.press('ArrowLeft')
  assert sources()[1] != before[1]
  loaded = 'images => images.every(image => image.complete && image.naturalWidth === 64)'
  assert images.evaluate_all(loaded)


def test_the_film_plays_to_its_end(opened):
  book = opened.locator('#samples [data-flipbook]').first
  assert book.locator('output').inner_text() == '5 of 5'
  book.locator('.play').click()
  assert book.locator('output').inner_text() != '5 of 5'
  opened.wait_for_function(
    "document.querySelector('#samples [data-flipbook] output').textContent === '5 of 5'",
  )
  assert book.locator('.play').get_attribute('aria-label') == 'Play'


BRIGHTNESS = """() => ['body', 'h1'].map((name) => {
  const style = getComputedStyle(document.querySelector(name));
  const text = name === 'h1' ? style.color : style.backgroundColor;
  return text.match(/\\d+/g).slice(0, 3).reduce((sum, value) => sum + Number(value), 0) / 3;
})"""
AXIS = (
  '() => plots[0].left[0].major_label_text_color.value ?? plots[0].left[0].major_label_text_color'
)


@pytest.mark.parametrize(
  'opened',
  [{'color_scheme': 'light'}, {'color_scheme': 'dark'}],
  indirect=True,
  ids=['light', 'dark'],
)
def test_themes_follow_the_system_and_the_button(opened, request):
  ground, text = opened.evaluate(BRIGHTNESS)
  dark = 'dark' in request.node.name
  assert (ground < 60 < 200 < text) if dark else (text < 60 < 200 < ground)
  axis = opened.evaluate(AXIS)
  opened.locator('#theme').click()
  ground, text = opened.evaluate(BRIGHTNESS)
  assert (text < 60 < 200 < ground) if dark else (ground < 60 < 200 < text)
  assert opened.evaluate(AXIS) != axis
  opened.reload()
  assert opened.evaluate(BRIGHTNESS) == [ground, text]  # the choice is kept


PHONE = {'viewport': {'width': 360, 'height': 740}, 'is_mobile': True, 'has_touch': True}


@pytest.mark.parametrize('opened', [PHONE], indirect=True, ids=['phone'])
def test_a_phone_needs_no_horizontal_scrolling(opened):
  for details in opened.locator('details').all():
    details.evaluate('node => { node.open = true; }')
  assert opened.evaluate('document.documentElement.scrollWidth') == 360
  widths = opened.locator('.plot').evaluate_all('plots => plots.map(p => p.offsetWidth)')
  assert min(widths) > 280
  assert max(widths) <= 360


def test_a_file_that_is_no_report_is_not_replaced(run):
  before = (run / 'config.json').read_bytes()
  with pytest.raises(
    UserError, match='config.json is no report, and is not replaced: set --report'
  ):
    run_lib.make_report([run], run / 'config.json')
  assert (run / 'config.json').read_bytes() == before
  (run / 'empty.html').touch()
  for name in ('report.html', 'report.html', 'empty.html'):  # a report may be, and an empty file
    run_lib.make_report([run], run / name)


def test_a_path_that_is_not_utf8_is_shown_with_a_mark(run):
  path = run / 'config.json'
  config = json.loads(path.read_text())
  config['data']['path'] = '/pictures/caf\udce9'
  path.write_text(json.dumps(config))
  assert '/pictures/caf?' in run_lib.make_report([run]).read_text()
