"""Prints the table of docs/backbones.md: parameters and MACs of every backbone, counted.

    python scripts/backbones.py [--write]

``--write`` puts it into the page, between the lines that mark it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.efficiency import macs, parameters
from faceless.backbones import ARCHITECTURES
from faceless.files import atomic_write

PAGE = Path(__file__).resolve().parents[1] / "docs" / "backbones.md"
BEGIN, END = "<!-- table: python scripts/backbones.py -->", "<!-- end of table -->"
#: Where one name is more than one published network, the options of the others.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "mobilefacenet": [{}, {"embedding_dim": 256}, {"embedding_dim": 128}, {"embedding_dim": 128, "affine": True}],
    "slimresnet": [{"embedding_dim": 128}],
    "pocketnet-s": [{}, {"embedding_dim": 256}],
    "pocketnet-m": [{}, {"embedding_dim": 256}],
    "edgeface-xs": [{}, {"rank_ratio": 0.6}],
    "edgeface-s": [{}, {"rank_ratio": 0.5}],
    "ghostfacenet": [{}, {"stride": 2}],
    "ghostfacenet-v2": [{}, {"stride": 2}],
    "cvlface-vit-small": [{}, {"keypoints": True}],
    "cvlface-vit-base": [{}, {"keypoints": True}],
    "timm": [],
    "transformers": [],
}


def rows() -> list[str]:
    """The lines of the table."""
    lines = ["| name | input | dimensions | parameters | MACs |", "|---|---|---|---|---|"]
    for name, architecture in ARCHITECTURES.items():
        for options in VARIANTS.get(name, [{}]):
            side = architecture.spec.height
            wanted = {"embedding_dim": architecture.embedding_dim, "input_size": side} | options
            with torch.device("meta"):
                network, face = architecture.build(**wanted), torch.zeros(1, 3, side, side)
            extra = "".join(f", `{key}={value}`" for key, value in options.items() if key != "embedding_dim")
            counts = f"{parameters(network):,} | {macs(network, face):,}"
            lines.append(f"| `{name}`{extra} | {side} | {wanted['embedding_dim']} | {counts} |")
    return lines


def table(page: str) -> str:
    """The page with the table in its place."""
    before, after = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    return "\n".join([before, "", *rows(), "", after])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        atomic_write(PAGE, table(PAGE.read_text("utf-8")))
    else:
        print("\n".join(rows()))


if __name__ == "__main__":
    main()
