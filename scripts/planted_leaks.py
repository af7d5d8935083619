"""Does the audit find leaks? Photographs of known people, mildly changed, are hidden in a corpus of generated faces.

``python scripts/planted_leaks.py --corpus corpora/quickstart --other runs/quickstart/student`` copies the first faces
of a corpus, hides 200 AT&T faces of people 1 to 20 among them (each cropped, flipped, blurred or compressed), and
audits the mixture with their photographs as reference and people 21 to 40 as null gallery. Nothing is trained.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

import faceless
from eval import benchmarks
from faceless.errors import command
from faceless.randomness import Rng
from mining.audit import Audit, audit
from mining.faces import Faces, digest
from mining.gallery import Gallery


def changed(faces: torch.Tensor, seed: int) -> list[bytes]:
    """Crop up to 6 % off each side, flip every second one, blur every third one, JPEG at quality 60 to 90."""
    numbers = Rng.of(seed, "planted", range(len(faces))).uniform(5)
    found = []
    for row, (face, u) in enumerate(zip(faces, numbers.tolist())):
        side = face.shape[-1]
        cut = [int(0.06 * side * share) for share in u[:4]]
        crop = face[:, cut[0] : side - cut[1], cut[2] : side - cut[3]]
        crop = F.interpolate(crop[None].float(), (side, side), mode="bilinear", antialias=True)[0]
        crop = crop.flip(-1) if row % 2 else crop
        image = Image.fromarray(crop.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
        image = image.filter(ImageFilter.GaussianBlur(1)) if row % 3 == 0 else image
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(60 + 30 * u[4]))
        found.append(file.getvalue())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", default="corpora/quickstart")
    parser.add_argument("--other", default="runs/quickstart/student", help="the second recognizer")
    parser.add_argument("--teacher", default="dlib-resnet29")
    parser.add_argument("--faces", type=int, default=20_000)
    parser.add_argument("--output", default="audits/planted")
    given = parser.parse_args()
    output, source = Path(given.output), Faces(given.corpus)
    side = source.images([0]).shape[-1]
    people = benchmarks.load("att-faces", framing="dlib", size=side)
    known, others = people.identities < 20, people.identities >= 20
    encoded = source.encoded(range(given.faces)) + changed(people.images[known], seed=0)
    mixture = output / "corpus"
    mixture.mkdir(parents=True, exist_ok=True)
    images = pa.array([{"bytes": data, "path": None} for data in encoded])
    pq.write_table(pa.table({"image": images}), mixture / "0.parquet", row_group_size=256)

    networks = {digest(net): net for net in (faceless.load(name) for name in (given.teacher, given.other))}
    for name, which in (("reference", known), ("null", others)):
        gallery = Gallery.of(people.images[which], people.identities[which].numpy(), networks)
        gallery.save(output / f"{name}.safetensors")
    found = audit(
        Audit(
            corpus=str(mixture),
            recognizers=[given.teacher, given.other],
            reference=str(output / "reference.safetensors"),
            null=str(output / "null.safetensors"),
            output=str(output),
            cache=str(output / "cache"),
        )
    )
    flagged = pq.read_table(output / "leaks.parquet")["row"].to_numpy()
    planted = int(known.sum())
    hit = int((flagged >= given.faces).sum())
    result = {"planted": planted, "found": hit, "false_alarms": int(len(flagged) - hit), "generated": given.faces}
    result |= {
        "missed_rows": sorted(set(range(planted)) - set((flagged[flagged >= given.faces] - given.faces).tolist()))
    }
    print(json.dumps(result | {"agreed": found["leakage"]["agreed"]}))
    print(found["verdict"])
    print(json.dumps(found["leakage"]["recognizers"], indent=1))
    print(json.dumps({key: found[key] for key in ("duplicates", "diversity", "balance")}))


if __name__ == "__main__":
    command(main)()
