"""What mining shows: histograms as SVG, faces side by side as PNG. The same data give the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from faceless.recognizer import resize

# Of Okabe and Ito, which people with any color vision can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "faceless", "font.size": 9, "text.parse_math": False}


def histograms(
    named: Mapping[str, np.ndarray], label: str, marks: Mapping[str, float] | None = None, log: bool = False
) -> str:
    """Shares of values in 60 bins, one outline for each name, and vertical lines at ``marks``; an SVG document."""
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        everything = np.concatenate([np.asarray(values, float) for values in named.values()])
        edges = np.linspace(everything.min(), everything.max() + 1e-6, 61)
        for color, (name, values) in zip(COLORS, named.items()):
            shares = np.histogram(values, edges)[0] / max(len(values), 1)
            axes.stairs(shares, edges, fill=True, color=color, alpha=0.3, linewidth=0)
            axes.stairs(shares, edges, color=color, linewidth=1.3, label=f"{name} ({len(values):,})")
        for dash, (name, value) in enumerate((marks or {}).items(), 1):
            axes.axvline(value, color="#22262b", linewidth=1, linestyle=(0, (3, dash)), label=f"{name}: {value:.3f}")
        if log:
            axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("share of faces")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        FigureCanvasSVG(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return re.sub(r"<metadata>.*?</metadata>\s*", "", buffer.getvalue(), flags=re.DOTALL)


def sheet(columns: Mapping[str, Tensor], captions: Sequence[Sequence[str]], tile: int = 96, across: int = 4) -> bytes:
    """Rows of faces that belong together, ``across`` of them side by side, as the bytes of a PNG.

    Args:
        columns: faces ``[n, 3, H, W]`` by their heading.
        captions: ``[n]`` rows of one text for each column.
    """
    count, width, height = len(captions), len(columns) * tile, tile + 14
    across = max(1, min(across, count))
    page = Image.new("RGB", (across * (width + 12), 16 + -(-count // across) * height), "white")
    draw = ImageDraw.Draw(page)
    for number in range(across):
        for place, heading in enumerate(columns):
            draw.text((number * (width + 12) + place * tile + 2, 2), heading, fill="black")
    for place, faces in enumerate(columns.values()):
        small = resize(faces.float(), tile, tile).round().clamp(0, 255).to(torch.uint8) if len(faces) else faces
        for number, face in enumerate(small):
            x, y = number % across * (width + 12) + place * tile, 16 + number // across * height
            page.paste(Image.fromarray(face.permute(1, 2, 0).contiguous().numpy()), (x, y))
            draw.text((x + 2, y + tile), captions[number][place], fill="#5d6672")
    file = io.BytesIO()
    page.save(file, format="PNG")
    return file.getvalue()
