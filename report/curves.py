"""Curves over training steps as Bokeh figures, which the page draws without any fetch.

Text stays out of the drawings, except for the numbers at the axes: Bokeh would look for TeX in it,
and names come from files. Titles and legends are HTML; the colours of a theme are set by the page.
"""

import dataclasses
from typing import Any

import numpy as np
from bokeh.embed import json_item
from bokeh.models import (
  BasicTickFormatter,
  BoxZoomTool,
  ColumnDataSource,
  CustomJSHover,
  FixedTicker,
  GlyphRenderer,
  HoverTool,
  NumeralTickFormatter,
  PanTool,
  Range1d,
  ResetTool,
  WheelZoomTool,
)
from bokeh.plotting import figure
from bokeh.resources import Resources
from jaxtyping import Float, Int

# One for each run, in this order: they differ on white and on black, and for the colour-blind.
COLOURS = ('#3b82f6', '#ea7317', '#0f9d75', '#c2478f', '#8b6bd9', '#b08900', '#5c8a99', '#d64545')
_DASHES = ('solid', 'dashed', 'dotted', 'dashdot')

_TOOLTIP = """<div style="display: flex; align-items: center; gap: 0.5em; white-space: nowrap">
<i style="width: 0.7em; height: 0.7em; border-radius: 50%; background: @line{colour}"></i>
<b>@value{custom}</b>
<span style="opacity: 0.75">step @step{0,0} &middot; @line{name}</span></div>"""
_OF_LINE = 'return format == "colour" ? colours[value] : names[value]'
_OF_VALUE = 'return Number(value.toPrecision(5)).toString()'
_HEIGHT = 230
_LOG_RATIO = 20  # of the largest to the smallest value, from which on an axis is logarithmic
_SMOOTHED = 200  # points from which on a curve also gets its running mean


@dataclasses.dataclass(frozen=True)
class Line:
  """One line of a chart.

  Attributes:
    run: the number of the run, which decides the colour.
    name: what the line is, for the box on hover.
    steps: the steps.
    values: the values, finite.
    style: the number of the line's pattern of dashes.
  """

  run: int
  name: str
  steps: Int[np.ndarray, ' n']
  values: Float[np.ndarray, ' n']
  style: int = 0


@dataclasses.dataclass(frozen=True)
class Chart:
  """A chart of the page.

  Attributes:
    title: what is shown.
    about: a sentence below the title; '' for none.
    item: the drawing, as `Bokeh.embed.embed_item` takes it.
    notes: how the lines were thinned or smoothed.
  """

  title: str
  about: str
  item: dict[str, Any]
  notes: list[str]


def javascript() -> str:
  """The library that draws the charts, to be put into the page."""
  return '\n'.join(Resources(mode='inline', components=['bokeh']).js_raw)


def thin(values: Float[np.ndarray, ' n'], limit: int) -> Int[np.ndarray, ' m']:
  """The indices of at most `limit` values that keep the ends and all spikes.

  The values between the first and the last are cut into bins of as equal lengths as possible, and
  each bin keeps its smallest and its largest value.

  Args:
    values: n finite values.
    limit: at least 4.

  Returns:
    Increasing indices; all of them if n is at most `limit`.
  """
  if len(values) <= limit:
    return np.arange(len(values))
  bins = np.array_split(np.arange(1, len(values) - 1), (limit - 2) // 2)
  extremes = [part[f(values[part])] for part in bins for f in (np.argmin, np.argmax)]
  return np.unique([0, *extremes, len(values) - 1])


def running_mean(values: Float[np.ndarray, ' n'], width: int) -> Float[np.ndarray, ' n']:
  """The mean of the `width` values around each, of fewer at the ends; `width` is odd."""
  sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
  half, index = width // 2, np.arange(len(values))
  low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
  return (sums[high] - sums[low]) / (high - low)


def build(
  title: str,
  about: str,
  lines: list[Line],
  *,
  span: tuple[float, float],
  limit: int,
  markers: bool = False,
) -> Chart:
  """Draws lines over training steps.

  Args:
    title: what is shown.
    about: a sentence about it.
    lines: the lines, each with at least one value.
    span: the first and the last step of the horizontal axis.
    limit: how many points of a line are drawn at most.
    markers: whether each point has a marker.
  """
  values = np.concatenate([line.values for line in lines])
  log = bool(values.min() > 0 and values.max() > _LOG_RATIO * values.min())
  plot = _empty(span, values, log)
  notes, hovered = [], []
  for number, line in enumerate(lines):
    source, renderers, about_line = _draw(plot, number, line, limit, markers)
    notes += about_line
    hovered.append(source)
    for renderer in renderers:
      renderer.tags = [line.run]  # by which the legend of the page hides it
  plot.add_tools(_hover(hovered, lines))
  if log:
    notes.append('The vertical axis is logarithmic.')
  return Chart(title, about, json_item(plot), notes)


def _draw(
  plot: Any, number: int, line: Line, limit: int, markers: bool
) -> tuple[GlyphRenderer, list[GlyphRenderer], list[str]]:
  """Adds a line: the drawing that the box on hover reads, all drawings, and notes about them."""
  notes, name = [], line.name
  look = {
    'color': COLOURS[line.run % len(COLOURS)],
    'line_dash': _DASHES[line.style % len(_DASHES)],
  }
  kept = thin(line.values, limit)
  if len(kept) < len(line.values):
    notes.append(
      f'{name}: {len(kept):,} of {len(line.values):,} points are drawn, the smallest and the '
      f'largest of each bin.'
    )
  source = _source(number, line.steps[kept], line.values[kept])
  smooth = len(line.values) >= _SMOOTHED and not markers
  alpha, width = (0.35, 1) if smooth else (1, 1.8)
  exact = plot.line('step', 'value', source=source, line_width=width, alpha=alpha, **look)
  drawn = [exact]
  if smooth:
    count = len(line.values) // 40 * 2 + 1
    means = running_mean(line.values, count)
    kept = thin(means, limit // 2)
    mean = _source(number, line.steps[kept], means[kept])
    drawn.append(plot.line('step', 'value', source=mean, line_width=2, **look))
    notes.append(f'{name}: the bold line is the mean of {count} points.')
  if markers or len(kept) == 1:
    drawn.append(plot.scatter('step', 'value', source=source, size=7, color=look['color']))
  return exact, drawn, notes


def _hover(renderers: list[Any], lines: list[Line]) -> HoverTool:
  """The box with the values of all lines at the step under the pointer."""
  names = {
    'names': [line.name for line in lines],
    'colours': [COLOURS[line.run % len(COLOURS)] for line in lines],
  }
  return HoverTool(
    renderers=renderers,
    tooltips=_TOOLTIP,
    formatters={
      '@line': CustomJSHover(args=names, code=_OF_LINE),
      '@value': CustomJSHover(code=_OF_VALUE),
    },
    mode='vline',
    attachment='vertical',
  )


def span(lines: list[Line]) -> tuple[float, float]:
  """The first and the last step of an axis for these lines, with a margin."""
  steps = np.concatenate([line.steps for line in lines])
  low, high = float(steps.min()), float(steps.max())
  margin = 0.02 * (high - low) or 1
  return low - margin, high + margin


def _log_ticks(low: float, high: float) -> FixedTicker:
  """Ticks at 1, 2 and 5 in each decade, or at 1 if there are many; Bokeh's own are uneven."""
  first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
  mantissas = (1, 2, 5) if last - first <= 3 else (1,)
  decades = range(first, last + 1)
  return FixedTicker(ticks=[float(f'{m}e{k}') for k in decades for m in mantissas])


def _empty(span: tuple[float, float], values: Float[np.ndarray, ' n'], log: bool) -> Any:
  wheel = WheelZoomTool(dimensions='width', modifiers='ctrl')
  zoom = BoxZoomTool(dimensions='auto')
  plot = figure(
    height=_HEIGHT,
    min_width=120,
    sizing_mode='stretch_width',
    x_range=Range1d(*span, reset_start=span[0], reset_end=span[1]),
    y_axis_type='log' if log else 'linear',
    tools=[zoom, PanTool(), wheel, ResetTool()],
    active_drag=zoom,
    active_scroll=wheel,
    background_fill_color=None,
    border_fill_color=None,
    outline_line_color=None,
    output_backend='canvas',
  )
  plot.toolbar.logo = None
  plot.toolbar.autohide = True
  plot.toolbar_location = 'above'
  plot.toolbar_inner = True
  plot.toolbar.stylesheets = [':host { background: none !important; }']
  plot.xaxis.formatter = NumeralTickFormatter(format='0.[0]a')
  plot.yaxis.formatter = BasicTickFormatter(power_limit_high=5, power_limit_low=-4)
  plot.yaxis.ticker.desired_num_ticks = 5
  if log:
    plot.yaxis.ticker = _log_ticks(float(values.min()), float(values.max()))
  plot.axis.axis_line_color = None
  plot.axis.major_tick_line_color = None
  plot.axis.minor_tick_line_color = None
  plot.axis.major_label_text_font = 'system-ui, sans-serif'
  plot.axis.major_label_text_font_size = '12px'
  plot.xaxis.ticker.desired_num_ticks = 5
  plot.xgrid.grid_line_color = None
  return plot


def _source(
  number: int, steps: Int[np.ndarray, ' m'], values: Float[np.ndarray, ' m']
) -> ColumnDataSource:
  """The columns of one line; `number` is that of the line in its chart."""
  kind = np.int32 if steps.max(initial=0) < 2**31 else np.float64
  line = np.full(len(steps), number, np.uint8)
  return ColumnDataSource({'step': steps.astype(kind), 'value': values, 'line': line})
