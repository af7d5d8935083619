"""What people look at first: the datasheet and the contact sheet of a corpus."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image


def datasheet(manifest: dict[str, Any]) -> str:
    """Markdown after Gebru et al., Datasheets for Datasets (CACM 2021), filled from the manifest alone."""
    generator, counts, image = manifest["generator"], manifest["counts"], manifest["image"]
    rejected = counts["rejected"]
    rows = "\n".join(f"| {reason} | {number:,} |" for reason, number in sorted(rejected.items())) or "| none | 0 |"
    licences = "\n".join(f"- {entry['what']}: {entry['licence']}" for entry in manifest["licences"])
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest["versions"].items()))
    framing = manifest["settings"]["align"]
    crop = "Faces are as the generator made them."
    if framing:
        crop = (
            f"Each face was found by dlib's HOG detector at {framing['detect_size']} pixels, {framing['points']} "
            f"landmarks were predicted, and it was cut to the {framing['framing']} framing at {framing['size']} pixels."
        )
    settings = manifest["settings"]
    people = "- No identity, age, sex or other attribute is recorded, and none was estimated."
    if "identity" in manifest["columns"]:
        people = (
            f"- `identity` numbers {whom(generator)} whom the generator was told to show; whether it did was not "
            "checked.\n- No age, sex or other attribute is recorded, and none was estimated."
        )
    more = ""
    if settings.get("around"):
        more += (
            f"- Latents were drawn near given ones (file of {settings['around']}), `around_scale` "
            f"{settings.get('around_scale', 0.5):g}; `parent` is the row there.\n"
        )
    if "mined_by" in manifest:
        more += f"- Those were mined where {pair(manifest['mined_by'])} disagree.\n"
    if "student" in generator:
        more += (
            f"- The faces were made against the student {generator['student']} (SHA-256 "
            f"{generator['student_sha256'] or 'unknown'}), which another student should know.\n"
        )
    if settings.get("teacher"):
        more += (
            f"- `embedding` is what the recognizer {settings['teacher']} (SHA-256 {settings['teacher_sha256']}) makes "
            "of the face, before normalization; `quality` is its norm.\n"
        )
    if settings.get("gate"):
        floors = ", ".join(f"{name} {value:g}" for name, value in settings["gate"].items())
        more += f"- Quality gate on the stored images: {floors}.\n"
    return f"""# Datasheet

## Motivation
Unlabeled faces for distilling a face recognizer without using pictures of real people.

## Composition
- {manifest["rows"]:,} generated faces, {image["height"]} x {image["width"]} RGB, {image["format"]}; one row each.
- **No row is a photograph of a person** (`real_faces: {str(manifest["real_faces"]).lower()}`). What the generator was
  trained on may still have been; see its licence below. A face may resemble somebody by chance, or because a generator
  remembers its training data; this corpus was not audited for that.
{people}
- Columns: {", ".join(manifest["columns"])}.
  `index` is the number of the candidate and, with `seed`, determines latent and face; `size` is the length of the
  encoded image in bytes.

## Collection
- Generator {generator["generator"]}, weights SHA-256 {generator.get("weights_sha256") or "none (untrained)"}.
- Seed {manifest["settings"]["seed"]}; latents are drawn from a counter-based generator, one per candidate index.
- {counts["candidates"]:,} candidates in whole blocks; of {counts["accepted"]:,} accepted, the first
  {manifest["rows"]:,} were kept.
{more}
## Preprocessing
{crop} Rejected candidates:

| reason | candidates |
|---|---|
{rows}

A detector and its thresholds prefer some faces to others: frontal, evenly lit ones, and those its training data held.
What it rejects is missing here.

## Uses
Meant for training and comparing recognizers. Not meant for judging how well a recognizer works on people: use
photographs of consenting people for that.

## Distribution
{licences}

## Maintenance
Written by faceless with {versions}. The same settings, versions and kind of processor give the same bytes.
"""


def pair(judges: dict[str, Any]) -> str:
    """Teacher and student, by name and SHA-256."""
    named = [f"the {role} {judges[role]} (SHA-256 {judges[f'{role}_sha256']})" for role in ("student", "teacher")]
    return " and ".join(named)


def whom(generator: dict[str, Any]) -> str:
    """Who the people of a corpus with identities are, as far as its record tells."""
    if "contexts_sha256" not in generator:
        return "the classes that the generator was trained on, **which may be real people**,"
    source = generator.get("identities_from")
    if source is None:
        return "the invented people"
    told = {
        True: "**the real people**",
        False: "the people, invented as whoever wrote the corpus says,",
        None: "the people, **real or not: that is not recorded**,",
    }[source["real"]]
    return f"{told} of a file of vectors (SHA-256 {source['file_sha256']})"


def contact_sheet(images: Sequence[bytes], columns: int = 16, tile: int = 96) -> bytes:
    """Encoded faces, row by row, as the bytes of one PNG."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * tile, rows * tile))
    for i, image in enumerate(images):
        face = Image.open(io.BytesIO(image)).convert("RGB")
        sheet.paste(face.resize((tile, tile), Image.Resampling.BILINEAR), (i % columns * tile, i // columns * tile))
    file = io.BytesIO()
    sheet.save(file, format="PNG")
    return file.getvalue()
