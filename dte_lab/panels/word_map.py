"""The map of words with the paths of predicted embeddings: two figures, and a view with hover."""

import html
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dte_lab.common.plots import HAIRLINE, INK, MUTED
from dte_lab.panels.regularisation import REGULARISER_LOOKS
from dte_lab.panels.shared import BLUE, GREEN, PINK, VERMILION, plain

# Each with a marker of its own: one per concept.
CONCEPT_COLOURS, CONCEPT_MARKERS = (VERMILION, BLUE, GREEN, PINK), "osD^"
PHASES = {"pretraining": (":", 1.4), "tuning": ("-", 2.0)}
Places = Mapping[tuple[str, str, str], np.ndarray]  # {(phase, kind, concept): places (n, 2)}


def map_figure(
    positions: Float[np.ndarray, "words 2"],
    words: Sequence[str],
    paths: Places,
    named: Sequence[int],
) -> Figure:
    """The whole map twice, with the contrastive term and without; `named`: words to label."""
    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    for ax, kind in zip(figure.subplots(1, 2), REGULARISER_LOOKS, strict=True):
        _words(ax, positions)
        _paths(ax, {key: path for key, path in paths.items() if key[1] == kind})
        _label(ax, positions, words, named, reach=0.5)
        ax.set_title(f"{kind}: {REGULARISER_LOOKS[kind][0]}", fontsize=11, color=INK)
        ax.set_xlim(-0.03, 1.03)
        ax.set_ylim(-0.03, 1.03)
    handles, names = _legend(paths)
    figure.legend(handles, names, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    return figure


def zoom_figure(
    positions: Float[np.ndarray, "words 2"],
    words: Sequence[str],
    paths: Places,
    phase: str,
    named: Sequence[int],
) -> Figure:
    """Each concept's paths of one phase from close by, a row per regulariser."""
    concepts = list(dict.fromkeys(key[2] for key in paths if key[0] == phase))
    figure = Figure(figsize=(0.4 + 2.6 * len(concepts), 5.4), layout="constrained")
    axes = figure.subplots(2, len(concepts), squeeze=False)
    for j, concept in enumerate(concepts):
        both = np.concatenate([paths[phase, kind, concept] for kind in REGULARISER_LOOKS])
        centre = (both.min(0) + both.max(0)) / 2
        reach = max(0.03, 0.75 * np.ptp(both, axis=0).max())
        near = np.argsort(np.linalg.norm(positions - centre, axis=1))[:12].tolist()
        for i, kind in enumerate(REGULARISER_LOOKS):
            ax = axes[i, j]
            _words(ax, positions, 8)
            shown = {key: path for key, path in paths.items() if key == (phase, kind, concept)}
            _paths(ax, shown, concepts)
            _label(ax, positions, words, [*named, *near], reach, centre)
            ax.set_xlim(centre[0] - reach, centre[0] + reach)
            ax.set_ylim(centre[1] - reach, centre[1] + reach)
            if i == 0:
                ax.set_title(concept, fontsize=11, color=INK)
            if j == 0:
                ax.set_ylabel(REGULARISER_LOOKS[kind][0], fontsize=11, color=INK)
    return figure


def v_star_figure(
    curves: Mapping[tuple[str, str], tuple[Sequence[int], Mapping[str, Sequence[float]]]],
    titles: Mapping[str, str], xlabel: str,
) -> Figure:  # fmt: skip
    """What a map cannot show: measures of v* over steps, a column per concept.

    curves: {(kind, concept): (steps, {measure: values})}. titles: {measure: title}.
    """
    concepts = list(dict.fromkeys(concept for _, concept in curves))
    figure = Figure(figsize=(0.6 + 2.6 * len(concepts), 2.1 * len(titles) + 0.5))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(titles), len(concepts), squeeze=False, sharex=True, sharey="row")
    for (kind, concept), (steps, values) in curves.items():
        label, colour, marker = REGULARISER_LOOKS[kind]
        for i, (measure, title) in enumerate(titles.items()):
            ax = axes[i, concepts.index(concept)]
            ax.plot(
                steps, values[measure], color=colour, ls="-" if kind == "contrastive" else "--",
                marker=marker, markevery=[-1], label=label,
            )  # fmt: skip
            plain(ax)
            if concept == concepts[0]:
                ax.set_ylabel(title, fontsize=9)
            if i == 0:
                ax.set_title(concept, fontsize=10, color=INK)
            if i == len(titles) - 1:
                ax.set_xlabel(xlabel)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def hover_view(
    positions: Float[np.ndarray, "words 2"], words: Sequence[str], paths: Places,
    notes: Mapping[tuple[str, str, str], Sequence[str]], size: int = 460,
) -> str:  # fmt: skip
    """HTML with the map twice, in which words and the points of paths show their text on hover.

    notes: one text per point of each path. It works without a network or a kernel. The drawing is
    the attribute of a frame, so that a page that allows no frames shows nothing instead of debris.
    """
    kinds = list(REGULARISER_LOOKS)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {2 * size + 20} {size + 24}' "
        f"font-family='sans-serif' font-size='13' role='img' aria-label='Map of "
        f"{len(words)} words with the paths of {len(paths)} embeddings'>"
    ]
    concepts = list(dict.fromkeys(key[2] for key in paths))
    for column, kind in enumerate(kinds):
        parts.append(f"<g transform='translate({column * (size + 20)} 22)'>")
        parts.append(f"<text x='4' y='-7' fill='{INK}'>{kind}: {REGULARISER_LOOKS[kind][0]}</text>")
        parts.append(
            f"<rect width='{size}' height='{size}' fill='none' stroke='{HAIRLINE}'/><g fill='#bbb'>"
        )
        for word, (x, y) in zip(words, _pixels(positions, size), strict=True):
            parts.append(
                f"<circle cx='{x}' cy='{y}' r='2.4'><title>{_escaped(word)}</title></circle>"
            )
        parts.append("</g>")
        for key, path in paths.items():
            if key[1] == kind:
                colour = CONCEPT_COLOURS[concepts.index(key[2]) % len(CONCEPT_COLOURS)]
                parts.append(_svg_path(_pixels(path, size), colour, key, notes[key]))
        parts.append("</g>")
    svg = "".join([*parts, "</svg>"])
    page = f"<style>body{{margin:0}} circle:hover{{stroke:#000;stroke-width:1.5}}</style>{svg}"
    return (
        f'<div><iframe title="Map of words; hover over a point to read it" width="100%" '
        f'height="{size + 44}" style="border:0" srcdoc="{page}"></iframe></div>'
    )


def _svg_path(
    points: Sequence[tuple[int, int]],
    colour: str,
    key: tuple[str, str, str],
    notes: Sequence[str],
) -> str:
    dash = " stroke-dasharray='2 3'" if key[0] == "pretraining" else ""
    line = " ".join(f"{x},{y}" for x, y in points)
    dots = "".join(
        f"<circle cx='{x}' cy='{y}' r='{5 if i == len(points) - 1 else 3}'>"
        f"<title>{_escaped(note)}</title></circle>"
        for i, ((x, y), note) in enumerate(zip(points, notes, strict=True))
    )
    return (
        f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='1.5'{dash}/>"
        f"<g fill='{colour}'>{dots}</g>"
    )


def _escaped(text: str) -> str:
    """Escaped twice, for SVG that is itself the value of an attribute."""
    return html.escape(html.escape(text))


def _pixels(plane: Float[np.ndarray, "places 2"], size: int) -> list[tuple[int, int]]:
    """Places in the unit square as whole pixels from the top left."""
    scaled = 8 + np.asarray(plane) * (size - 16)
    return [(round(x), round(size - y)) for x, y in scaled.tolist()]


def _words(ax: Axes, positions: Float[np.ndarray, "words 2"], size: int = 3) -> None:
    ax.scatter(*positions.T, s=size, color="#bdbdbd", lw=0)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_color(HAIRLINE)


def _paths(ax: Axes, paths: Places, concepts: Sequence[str] | None = None) -> None:
    concepts = concepts or list(dict.fromkeys(key[2] for key in paths))
    for (phase, _, concept), path in paths.items():
        i = concepts.index(concept) % len(CONCEPT_COLOURS)
        dash, width = PHASES[phase]
        ax.plot(*path.T, dash, color=CONCEPT_COLOURS[i], lw=width, zorder=3)
        ax.plot(
            *path[0],
            CONCEPT_MARKERS[i],
            mfc="white",
            mec=CONCEPT_COLOURS[i],
            ms=8,
            mew=1.6,
            zorder=4,
        )
        ax.plot(
            *path[-1], CONCEPT_MARKERS[i], color=CONCEPT_COLOURS[i], mec="white", ms=8, zorder=5
        )


def _legend(paths: Places) -> tuple[list[Line2D], list[str]]:
    concepts = list(dict.fromkeys(key[2] for key in paths))
    handles = [
        Line2D([], [], color=CONCEPT_COLOURS[i % 4], marker=CONCEPT_MARKERS[i % 4], ls="none")
        for i in range(len(concepts))
    ]
    phases = [phase for phase in PHASES if any(key[0] == phase for key in paths)]
    handles += [Line2D([], [], color=MUTED, ls=PHASES[p][0], lw=PHASES[p][1]) for p in phases]
    handles.append(Line2D([], [], color=MUTED, marker="o", mfc="white", ls="none"))
    return handles, [*concepts, *phases, "start (filled: end)"]


def _label(
    ax: Axes,
    positions: Float[np.ndarray, "words 2"],
    words: Sequence[str],
    rows: Sequence[int],
    reach: float,
    centre: Sequence[float] = (0.5, 0.5),
) -> None:
    """Name words in the square of half side `reach`; a label that would cover another is left out.

    The first of the rows are named first.
    """
    taken = []
    for row in dict.fromkeys(rows):
        x, y = place = positions[row]
        inside = np.abs(place - centre).max() < 0.95 * reach
        if inside and all(abs(x - a) > 0.45 * reach or abs(y - b) > 0.09 * reach for a, b in taken):
            taken.append(place)
            ax.plot(x, y, "o", color=MUTED, ms=3, zorder=6)
            left = x < centre[0] + 0.5 * reach
            ax.annotate(
                words[row], place, (3 if left else -3, 3), textcoords="offset points",
                ha="left" if left else "right", fontsize=7.5, color=INK,
                bbox={"fc": "white", "ec": "none", "alpha": 0.65, "pad": 0.4}, zorder=6,
            )  # fmt: skip
