"""Curves as inline SVG: no library, no script, readable in print and in the dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from diffsynth_ray.report.record import Series

WIDTH, HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 30
_MOST_POINTS = 600
"""Of one curve; more are averaged in groups."""
_MOST_TICKS = 6


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    points: Series
    style: str
    """A class of the page's style sheet: colour and width."""
    dots: bool = False
    """Mark every point: for few of them."""


def smoothed(points: Series, *, window: int) -> Series:
    """Exponential moving average over about `window` points, without the pull of a start at zero."""
    keep = 1 - 1 / max(window, 1)
    total = weight = 0.0
    found = []
    for step, value in points:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + 1 - keep
        if weight:
            found.append((step, total / weight))
    return found


def draw_chart(
    curves: Sequence[Curve], *, unit: str = "", marks: Sequence[tuple[int, str]] = (), from_zero: bool = False
) -> str:
    """The chart; `marks` are vertical lines at steps, with what they stand for. Without a point it is the empty string."""
    shown = [Curve(c.name, _thinned(c.points), c.style, c.dots) for c in curves]
    shown = [curve for curve in shown if curve.points]
    if not shown:
        return ""
    values = [value for curve in shown for _, value in curve.points]
    steps = [step for curve in shown for step, _ in curve.points]
    scale = _Scale(min(steps), max(steps), 0.0 if from_zero else min(values), max(values))
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(shown[0].name)}">']
    parts += _axes(scale, unit)
    for step, meaning in marks:
        if scale.first <= step <= scale.last:
            x = scale.x(step)
            parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}">')
            parts.append(f"<title>{escape(meaning)}</title></line>")
    for curve in shown:
        path = " ".join(f"{scale.x(step):.1f},{scale.y(value):.1f}" for step, value in curve.points)
        parts.append(f'<polyline class="line {curve.style}" points="{path}"><title>{escape(curve.name)}</title></polyline>')
        if curve.dots or len(curve.points) == 1:
            parts += [
                f'<circle class="dot {curve.style}" cx="{scale.x(step):.1f}" cy="{scale.y(value):.1f}" r="3">'
                f"<title>{escape(curve.name)}, step {step}: {value:.6g}</title></circle>"
                for step, value in curve.points
            ]
    parts.append("</svg>")
    return "".join(parts) + (_legend(shown) if len(shown) > 1 else "")


class _Scale:
    """Steps and values to pixels."""

    def __init__(self, first: int, last: int, low: float, high: float) -> None:
        self.first, self.last = first, last
        if high <= low:
            low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
        self.ticks = ticks(low, high)
        self.low, self.high = min(low, self.ticks[0]), max(high, self.ticks[-1])

    def x(self, step: float) -> float:
        span = max(self.last - self.first, 1)
        return _LEFT + (step - self.first) / span * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - _TOP - _BOTTOM)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from about `low` to about `high`: 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / (_MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    apart = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [number * apart for number in range(math.floor(low / apart), math.ceil(high / apart) + 1)]


def _axes(scale: _Scale, unit: str) -> list[str]:
    parts = []
    for value in scale.ticks:
        y = scale.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}{escape(unit)}</text>')
    shown = [step for step in ticks(scale.first, max(scale.last, scale.first + 1)) if scale.first <= step <= scale.last]
    for step in shown:
        if step == int(step):
            x = scale.x(step)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{int(step)}</text>')
    return parts


def _legend(curves: Sequence[Curve]) -> str:
    items = "".join(f'<li><i class="key {curve.style}"></i>{escape(curve.name)}</li>' for curve in curves)
    return f'<ul class="legend">{items}</ul>'


def _thinned(points: Series) -> Series:
    usable = [(step, value) for step, value in points if math.isfinite(value)]
    if len(usable) <= _MOST_POINTS:
        return usable
    size = math.ceil(len(usable) / _MOST_POINTS)
    groups = [usable[first : first + size] for first in range(0, len(usable), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
