'use strict';

// Colours of the theme, as the browser resolves them.
function colour(name) {
  const probe = document.createElement('i');
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

const plots = [];

function paint() {
  const text = colour('--faint'), line = colour('--line');
  for (const plot of plots) {
    for (const axis of [...plot.left, ...plot.below]) axis.major_label_text_color = text;
    for (const grid of plot.center) grid.grid_line_color = line;
  }
}

// The curves of training are zoomed together.
const linked = [];
let following = false;

function link(range) {
  linked.push(range);
  range.connect(range.change, () => {
    if (following) return;
    following = true;
    const { start, end } = range;
    for (const other of linked) if (other !== range) other.setv({ start, end });
    following = false;
  });
}

async function draw() {
  const narrow = matchMedia('(pointer: coarse)').matches;  // a finger scrolls the page
  for (const script of document.querySelectorAll('script.drawing')) {
    const item = JSON.parse(script.textContent);
    const view = await Bokeh.embed.embed_item(item, script.dataset.target);
    const plot = (view.roots ?? view)[0].model;
    plots.push(plot);
    if (script.dataset.target.startsWith('curve-')) link(plot.x_range);
    if (narrow) plot.toolbar.active_drag = null;
  }
  paint();
  document.documentElement.dataset.drawn = plots.length;
}

// Light and dark: the system decides until the reader does.
const dark = matchMedia('(prefers-color-scheme: dark)');
dark.addEventListener('change', paint);
document.getElementById('theme').addEventListener('click', () => {
  const root = document.documentElement;
  const now = root.dataset.theme || (dark.matches ? 'dark' : 'light');
  root.dataset.theme = now === 'dark' ? 'light' : 'dark';
  try { localStorage.setItem('theme', root.dataset.theme); } catch (error) { /* no storage */ }
  paint();
});

// The legend hides a run in all charts.
for (const button of document.querySelectorAll('.legend button')) {
  button.addEventListener('click', () => {
    const shown = button.getAttribute('aria-pressed') !== 'true';
    button.setAttribute('aria-pressed', shown);
    for (const plot of plots) {
      for (const renderer of plot.renderers) {
        if (renderer.tags[0] === Number(button.dataset.run)) renderer.visible = shown;
      }
    }
  });
}

// A slider over pictures: each run shows its newest picture at or before the position.
for (const book of document.querySelectorAll('[data-flipbook]')) {
  const { tracks, stops } = JSON.parse(book.querySelector('script').textContent);
  const slider = book.querySelector('input'), output = book.querySelector('output');
  const button = book.querySelector('.play'), figures = book.querySelectorAll('figure');
  const thumbnails = book.querySelector('.thumbnails');
  let timer = null;

  const show = () => {
    const stop = stops[slider.value];
    output.textContent = stop.label;
    thumbnails?.querySelectorAll('button').forEach((thumbnail, i) => {
      thumbnail.setAttribute('aria-current', i === Number(slider.value));
    });
    tracks.forEach((track, i) => {
      const frame = track.frames.findLast((candidate) => candidate.at <= stop.at);
      const image = figures[i].querySelector('img'), at = figures[i].querySelector('.at');
      image.hidden = !frame;
      figures[i].querySelector('.empty').hidden = Boolean(frame);
      if (at) at.textContent = frame ? frame.label : '';
      if (!frame) return;
      image.src = frame.uri;
      image.width = frame.width;
      image.height = frame.height;
      image.className = frame.enlarged ? 'enlarged' : '';
    });
  };
  const pause = () => {
    clearInterval(timer);
    timer = null;
    button.textContent = '\u25B6\uFE0E';
    button.setAttribute('aria-label', 'Play');
  };
  const next = () => {
    slider.value = Number(slider.value) + 1;
    show();
    if (Number(slider.value) === stops.length - 1) pause();
  };
  button.addEventListener('click', () => {
    if (timer) return pause();
    if (Number(slider.value) === stops.length - 1) slider.value = 0;
    show();
    button.textContent = '\u275A\u275A';
    button.setAttribute('aria-label', 'Pause');
    timer = setInterval(next, Math.max(120, Math.min(600, 6000 / stops.length)));
  });
  if (thumbnails) {
    stops.forEach((stop, i) => {
      const thumbnail = document.createElement('button'), image = document.createElement('img');
      thumbnail.type = 'button';
      image.src = tracks[0].frames[i].uri;
      image.alt = '';
      thumbnail.append(image, stop.label);
      thumbnail.addEventListener('click', () => { pause(); slider.value = i; show(); });
      thumbnails.append(thumbnail);
    });
  }
  slider.addEventListener('input', () => { pause(); show(); });
  show();
}

draw();
