"""The page of a review: pictures of the least certain decisions, buttons to decide them, a file to save."""

from __future__ import annotations

import base64
import html
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np

from volseg.box import Box
from volseg.io.corrections import Pair


@dataclass(frozen=True)
class Question:
    """One decision to be looked at.

    kind    "join" of two parts of an object, or "border" of two objects
    text    what was decided, and how
    points  voxels on the two sides of the saddle
    box     the part of a section that the picture shows, in three panels side by side
    labeled bool (y, x): where an object is in it
    zoom    pixels of the picture for each voxel
    gap     pixels behind each panel
    """

    kind: Literal["join", "border"] | str
    text: str
    points: Pair
    box: Box
    labeled: np.ndarray
    zoom: int
    gap: int


def format_page(path: str, file: dict, questions: list[Question], pictures: list[bytes]) -> str:
    """One HTML page with all pictures (JPEG) inside it.

    Parameters
    ----------
    path
        The run's folder.
    file
        A file of corrections that holds those which the run has (`volseg.io.corrections`).
    questions, pictures
        What is asked, and a picture of each.
    """
    data = {"file": file, "questions": [_plain(question) for question in questions]}
    script = json.dumps(data).replace("<", "\\u003c")
    items = "".join(_item(k, *item) for k, item in enumerate(zip(questions, pictures, strict=True)))
    command = html.escape(f"volseg segment {path} --corrections corrections.json")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>volseg review</title><style>{STYLE}</style>'
        f"<h1>{html.escape(path)}</h1>{LEGEND if questions else ''}"
        f'<div id="bar"><span id="state"></span> <button id="save">Save corrections.json</button> '
        f'<label>go on with a saved file <input type="file" id="load" accept=".json"></label>'
        f'<p id="then">Then decide the run anew: <code>{command}</code></p></div>'
        f'{items}<script type="application/json" id="data">{script}</script><script>{LOGIC}{SCRIPT}</script></html>'
    )


def _plain(question: Question) -> dict:
    (z, y, x), (_, ny, nx) = question.box.start, question.box.shape
    place: dict[str, int | str] = {
        "z": z,
        "y": y,
        "x": x,
        "ny": ny,
        "nx": nx,
        "zoom": question.zoom,
        "gap": question.gap,
    }
    place["labeled"] = base64.b64encode(np.packbits(question.labeled)).decode()
    return {"kind": question.kind, "text": question.text, "points": question.points, "place": place}


def _item(k: int, question: Question, picture: bytes) -> str:
    keep, change = ("Keep joined", "Split here") if question.kind == "join" else ("Keep apart", "Join")
    source = base64.b64encode(picture).decode()
    return (
        f'<section data-number="{k}"><h2>{html.escape(question.text)}</h2>'
        f'<div class="picture"><img alt="" src="data:image/jpeg;base64,{source}"></div>'
        f'<p><button data-choice="keep">{keep}</button> <button data-choice="change">{change}</button> '
        f'<button data-choice="">Undecided</button> <span class="cuts"></span></p></section>'
    )


LEGEND = (
    "<p>Left the image, then what was decided, then the other decision. Two colors: two objects. Cross: the saddle. Click two "
    "points in a picture to split the object between them at its weakest place.</p>"
)
STYLE = (
    "body{font:14px sans-serif;margin:2em}h2{font-size:1em}.picture{position:relative;display:inline-block;cursor:crosshair}"
    "img{max-width:100%;display:block}#bar{position:sticky;top:0;background:#fff;border-bottom:1px solid #888;padding:.5em 0;"
    "z-index:2}#bar p{margin:.5em 0 0}button{font:inherit;padding:.3em .8em}button.chosen{background:#0a5;color:#fff}"
    ".point{position:absolute;width:9px;height:9px;margin:-5px;border-radius:50%;border:2px solid #fff;background:#d02;"
    "pointer-events:none}.cuts span{margin-left:1em}section.decided h2::before{content:'\\2713  ';color:#0a5}"
)
# What a file says are the corrections of the run as a whole: those that it had (`earlier`), and of each question the choice and
# pairs of points to split. LOGIC knows no document.
LOGIC = """
"use strict";
const CUT = "two points in the picture of: ";

function begun(data) {
  return {earlier: data.file.corrections, answers: data.questions.map(() => ({choice: "", cuts: [], first: null}))};
}

function isDecided(one) { return one.choice !== "" || one.cuts.length > 0; }

function action(question, choice) {
  if (choice === "") return "undecided";
  return (question.kind === "join") === (choice === "keep") ? "join" : "split";
}

function fileText(data, kept) {
  const entries = [...kept.earlier];
  data.questions.forEach((question, k) => {
    const one = kept.answers[k], note = CUT + question.text;
    entries.push({do: action(question, one.choice), points: question.points, note: question.text});
    for (const points of one.cuts) entries.push({do: "split", points, note});
  });
  const {corrections, ...head} = data.file;
  const lines = entries.map(entry => "  " + JSON.stringify(entry)).join(",\\n");
  return JSON.stringify(head).slice(0, -1) + ',\\n "corrections": [\\n' + lines + "\\n]}\\n";
}

function fromFile(data, saved) {
  if (saved.format !== data.file.format || saved.run !== data.file.run) throw new Error("it is of another run");
  if (saved.labels !== data.file.labels && saved.corrections.some(entry => entry.labels))
    throw new Error("it names labels of another decision");
  const kept = {...begun(data), earlier: []};
  const same = (p, q) => JSON.stringify([...p].sort()) === JSON.stringify([...q].sort());
  for (const entry of saved.corrections) {
    if (entry.do === "undecided") continue;
    const cut = data.questions.findIndex(question => entry.do === "split" && entry.note === CUT + question.text);
    const k = data.questions.findIndex(question => entry.points && same(question.points, entry.points));
    if (cut >= 0) kept.answers[cut].cuts.push(entry.points);
    else if (k < 0) kept.earlier.push(entry);
    else kept.answers[k].choice = action(data.questions[k], "keep") === entry.do ? "keep" : "change";
  }
  return kept;
}

// The voxel under a pixel of a picture, null on the gaps; and the pixel of a voxel in each panel.
function voxelAt(place, column, row) {
  const panel = place.nx * place.zoom + place.gap;
  const x = Math.floor(column % panel / place.zoom), y = Math.floor(row / place.zoom);
  return x < 0 || y < 0 || x >= place.nx || y >= place.ny ? null : [place.z, place.y + y, place.x + x];
}

function pixelsOf(place, [, y, x]) {
  const panel = place.nx * place.zoom + place.gap, row = (y - place.y + .5) * place.zoom;
  return [0, 1, 2].map(k => [k * panel + (x - place.x + .5) * place.zoom, row]);
}

function sizeOf(place) { return [3 * (place.nx * place.zoom + place.gap), place.ny * place.zoom]; }

function isObject(place, [, y, x]) {
  const k = (y - place.y) * place.nx + x - place.x;
  return (atob(place.labeled).charCodeAt(k >> 3) >> (7 - k % 8) & 1) === 1;
}

function click(one, point) {
  if (one.first && String(one.first) !== String(point)) one.cuts.push([one.first, point]);
  one.first = one.first ? null : point;
}

function message(kept) {
  const all = kept.answers.length, count = kept.answers.filter(isDecided).length;
  if (!all) return "Nothing is uncertain: no join and no border of two parts of any size is left to decide.";
  return count === all ? "All " + all + " are decided: save the file." : count + " of " + all + " are decided.";
}
"""
SCRIPT = """
const byId = id => document.getElementById(id);
const data = JSON.parse(byId("data").textContent), sections = [...document.querySelectorAll("section")];
const memory = "volseg review " + data.file.run + " " + data.file.labels;
let kept = begun(data);

function show() {
  sections.forEach((section, k) => {
    const one = kept.answers[k], place = data.questions[k].place, [width, height] = sizeOf(place);
    section.classList.toggle("decided", isDecided(one));
    for (const button of section.querySelectorAll("[data-choice]"))
      button.classList.toggle("chosen", isDecided(one) ? button.dataset.choice === one.choice && one.choice !== "" : false);
    section.querySelectorAll(".point").forEach(dot => dot.remove());
    for (const point of [...one.cuts.flat(), ...(one.first ? [one.first] : [])]) {
      for (const [column, row] of pixelsOf(place, point)) {
        const dot = document.createElement("div");
        dot.className = "point";
        dot.style.left = 100 * column / width + "%";
        dot.style.top = 100 * row / height + "%";
        section.querySelector(".picture").append(dot);
      }
    }
    section.querySelector(".cuts").replaceChildren(...one.cuts.map((points, n) => {
      const line = document.createElement("span"), undo = document.createElement("button");
      line.textContent = "split between " + points.map(point => point.join(" ")).join(" and ") + " ";
      undo.textContent = "take back";
      undo.onclick = () => { one.cuts.splice(n, 1); changed(); };
      line.append(undo);
      return line;
    }));
  });
  byId("state").textContent = message(kept);
}

function changed() {
  try { localStorage.setItem(memory, JSON.stringify(kept)); } catch { /* a browser that keeps nothing for files */ }
  show();
}

sections.forEach((section, k) => {
  for (const button of section.querySelectorAll("[data-choice]"))
    button.onclick = () => {
      const choice = button.dataset.choice;
      kept.answers[k] = choice ? {...kept.answers[k], choice} : {choice: "", cuts: [], first: null};
      changed();
    };
  section.querySelector("img").onclick = event => {
    const box = event.target.getBoundingClientRect(), [width, height] = sizeOf(data.questions[k].place);
    const column = (event.clientX - box.left) * width / box.width, row = (event.clientY - box.top) * height / box.height;
    const point = voxelAt(data.questions[k].place, column, row);
    if (point && !isObject(data.questions[k].place, point)) byId("state").textContent = "There is no object at this point.";
    else if (point) { click(kept.answers[k], point); changed(); }
  };
});

byId("save").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([fileText(data, kept)], {type: "application/json"}));
  link.download = "corrections.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
};

byId("load").onchange = async event => {
  try { kept = fromFile(data, JSON.parse(await event.target.files[0].text())); changed(); }
  catch (error) { byId("state").textContent = "This file was not taken: " + error.message; }
};

try {
  const stored = JSON.parse(localStorage.getItem(memory));
  if (stored && stored.answers.length === kept.answers.length) kept = stored;
} catch { /* nothing was kept */ }
show();
"""
