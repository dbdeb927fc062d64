"""What happened to a run, along the same axis as its charts."""

from collections.abc import Sequence
from html import escape

import numpy as np

from fastvit_engine.observe.report.axes import Axes
from fastvit_engine.observe.report.chart import SIZE, columns
from fastvit_engine.observe.report.incidents import Moment, Track

_MOST = 400  # marks of one track; of more, some stand for others


def timeline(tracks: Sequence[Track], axes: Axes) -> str:
    """A figure with a row of marks per track."""
    height = SIZE / len(tracks)
    rows, marks = [], []
    for place, track in enumerate(tracks):
        middle = (place + 0.5) / len(tracks)
        name = f"{track.name} <b>{len(track.moments):,}</b>" if len(track.moments) > 1 else track.name
        rows.append(f'<span style="top:{100 * middle:.2f}%">{name}</span>')
        marks.append(f'<path class="grid" d="M0.0 {SIZE * middle:.1f}H{SIZE}"/>')
        top = SIZE * middle - 0.32 * height
        marks += [_mark(moment, track.style, top, 0.64 * height, axes) for moment in _thinned(track.moments)]
    label = max(len(f"{track.name} {len(track.moments):,}") for track in tracks)
    said = ", ".join(f"{track.name} {len(track.moments):,}" for track in tracks)
    return (
        '<figure class="chart wide"><figcaption><h3>Timeline</h3></figcaption>'
        f'<div class="plot timeline" style="--label:{label}ch;--tracks:{len(tracks)}"><div class="rows">{"".join(rows)}'
        f'</div><div class="canvas"><svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(f"Events over the training: {said}")}">{"".join(marks)}</svg></div>{columns(axes)}</div>'
        "</figure>"
    )


def _mark(moment: Moment, style: str, top: float, height: float, axes: Axes) -> str:
    left = SIZE * axes.left(np.array([float(moment.step)]))[0]
    return (
        f'<path class="mark {style}" data-step="{moment.step}" d="M{left:.1f} {top:.1f}v{height:.1f}">'
        f"<title>{escape(f'step {moment.step:,}, {moment.text}')}</title></path>"
    )


def _thinned(moments: Sequence[Moment]) -> list[Moment]:
    """At most `_MOST` of them, evenly chosen: more are a bar."""
    if len(moments) <= _MOST:
        return list(moments)
    return [moments[place] for place in np.linspace(0, len(moments) - 1, _MOST).astype(int)]
