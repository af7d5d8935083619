"""Convert StyleGAN weights to a folder, once: ``python synth/convert.py stylegan2-ffhq.pkl weights/stylegan2-ffhq``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from faceless.errors import InputError, command
from synth.generators import stylegan_files
from synth.generators.stylegan_networks import StyleGAN2Config


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, those of this process when None."""
    parser = argparse.ArgumentParser(prog="synth/convert.py", description=(__doc__ or "").strip())
    parser.add_argument("weights", help="NVIDIA's .pkl (StyleGAN2, StyleGAN3) or rosinality's .pt; nothing is executed")
    parser.add_argument("folder", help="to write model.safetensors and config.json to")
    parser.add_argument("--licence", help="of the weights; shown and recorded with every corpus and run")
    given = parser.parse_args(arguments)
    loaded = stylegan_files.load(given.weights)
    if given.licence is not None:
        loaded.licence = given.licence
    if loaded.licence == "unknown":
        raise InputError(
            f"{given.weights}: its licence is not in it, and everything made with it will name it; say --licence TEXT"
        )
    stylegan_files.save(loaded, given.folder)
    config, side = loaded.network.config, loaded.network.synthesis.size
    family = "StyleGAN2" if isinstance(config, StyleGAN2Config) else "StyleGAN3"
    print(f"{given.folder}: {family} at {side} x {side}, from a {loaded.source['format']}, sha256 {loaded.sha256}")


if __name__ == "__main__":
    command(main)()
