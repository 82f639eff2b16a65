"""The words in a folder of suggestions: how to correct them in an editor, and a config to train with."""

from __future__ import annotations

import json
import os

from volseg.inference import model
from volseg.inference.model_card import ModelCard
from volseg.io.suggested import CHECKED, CONFIG, IMAGES, LABELS, UNKNOWN, Queue
from volseg.training.init import MIN_PATCH, PATCH

STEPS, RATE = 400, 5e-4  # from a model that has learned already: see benchmarks/README.md

README = """\
Sections to correct, the most telling first
===========================================

volume  {image}
run     {run}

{table}

score is 0 to 1. Why: voxels with a probability near the threshold; voxels that the network sees otherwise in the section
beside; uncertain joins and borders of objects; how unlike the annotated sections the gray values are.

What to do
----------
1. For a section, open {images}/NAME.tif and {labels}/NAME.tif. They have the same size, and know the size of a voxel.
2. Correct the labels: every object its own number, 0 for what is none. What you cannot tell gets {unknown}: it counts neither
   as object nor as background. Where you correct only a part, paint {unknown} over the rest.
3. Save under the same name (TIFF or PNG, 16 bits of gray, one page, no colors).
4. A section that is right as it is: write its name into {checked}. Sections that are neither changed nor named there are left
   out. You need not do all of them, and can come back for the rest.
5. Train with them, from this folder's parent:

       volseg train my.toml --add {folder}

   my.toml is the config that the model was trained with, or {folder}/{config}, which goes on from the model of this run.

napari
------
    volseg suggest {run} --out {folder_path} --napari

opens all of them: image, labels to correct, and the queue. Paint, erase and fill with the tools of the labels layer (M gives
the next free number); changed sections are saved when the window is closed. By hand: drag both files into napari, right-click
the labels, "Convert to Labels", and save with File > Save Selected Layers over {labels}/NAME.tif.

Fiji
----
File > Open both files. On the labels: Image > Lookup Tables > glasbey on dark. Over the image: Image > Overlay > Add Image,
with an opacity of 50. Draw a region with the freehand tool on the labels, then Process > Math > Set with the object's number; 0
erases. File > Save.

Any other editor (webKnossos, VAST, ilastik, MITK)
--------------------------------------------------
Import image and labels as they are: 16-bit gray TIFF, values are object numbers. Export the labels with the same size and name.

Scribbles instead
-----------------
Erase the labels of a section, draw 1 beside objects and 2 or more inside them, leave 0 where you did not look, and train with
`--add {folder} --scribbles`. Then all corrected sections of the folder are read so.
"""


def readme_text(queue: Queue, table: str, folder: str) -> str:
    """One page on how to correct the sections of a queue, which goes to the folder at that path."""
    return README.format(
        image=queue.image, run=queue.run, table=table, images=IMAGES, labels=LABELS, unknown=UNKNOWN, checked=CHECKED,
        folder=os.path.basename(folder), folder_path=folder, config=CONFIG,
    )  # fmt: skip


def config_text(card: ModelCard, queue: Queue, name: str) -> str:
    """A config for `volseg train` that goes on from the model of a run, with corrected sections alone."""
    plain = card.to_json()
    distance = plain.get("training", {}).get("settings", {}).get("distance_nm", 0) if "distance" in card.heads else 0
    multiple = 32 * card.binning
    patch = min(PATCH, max(MIN_PATCH, min(queue.shape[1:]) // multiple * multiple))
    lines = [
        "# Made by volseg suggest: goes on from the model of the run. Correct some sections, then, in the folder above:",
        f"#     volseg train {name}/{CONFIG} --add {name}",
        "",
        "[train]",
        f"out = {json.dumps(os.path.join('runs', name.removesuffix('.suggest')), ensure_ascii=False)}",
        f"start = {json.dumps(queue.model or model.SHIPPED, ensure_ascii=False)}",
        f"encoder = {json.dumps(card.encoder)}",
        f"decoder = {list(card.decoder)}",
        f"sections = {card.sections}",
        f"binning = {card.binning}",
        *([f"distance_nm = {distance}"] if distance else []),
        f"patch = {patch}",
        "batch = 6",
        f"steps = {STEPS}",
        "every = 100",
        f"lr = {RATE}",
    ]
    return "\n".join(lines) + "\n"
