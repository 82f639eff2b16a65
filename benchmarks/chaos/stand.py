"""Where episodes are played: small volumes, the commands on them, and what each gives undisturbed."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from benchmarks.chaos.command import Command, volseg
from benchmarks.chaos.episode import BLOCKED, Episode, hash_result

SHAPE = "16,128,128"
RESTARTS = 4  # how often a command is given again before it counts as blocked for ever
POLL_S = 0.006
SETTINGS = (
    "cluster.dashboard=''", "blocks.shape=[8,64,64]", "predict.tile=64", "predict.overlap=16", "predict.backend=openvino",
    "predict.precision=fp32", "stitch.min_voxels=20",
)  # fmt: skip
EXISTS = "exists; give another --out"
SUMMARY = "SUMMARY"  # instead of a stage: a run's last file is there


@dataclass(frozen=True)
class Job:
    """A command: its settings, the stages at whose markers it can be disturbed, and what it is given.

    source  "image", "probabilities", or "run": a finished run, decided anew in place
    """

    name: str
    source: str = "image"
    sets: tuple[str, ...] = ()
    stages: tuple[str, ...] = ("predict", "fragments", "link", "stitch", "relabel", "pyramid1", SUMMARY)


DECIDED = ("stitch", "relabel", "pyramid1", SUMMARY)
JOBS = {
    job.name: job
    for job in (
        Job("infer"),
        Job("segment", "probabilities", stages=("import", "fragments", "link", *DECIDED)),
        Job("decide", "run", ("stitch.seed=0.9", "stitch.min_voxels=30"), DECIDED),
        Job("tree", "probabilities", ("stitch.reduce=tree",), ("contract0", "rank", "assign0", "borders", *DECIDED)),
        Job("holes", "probabilities", ("stitch.fill_holes_voxels=300",), ("find_holes", "link_holes", *DECIDED)),
        Job("resampled", "image", ("input.voxel_size_nm=[7,7,7]",), ("predict", "fragments", *DECIDED)),
        Job("planes", "image", ("predict.planes=['xy','xz','yz']",), ("predict-xy", "predict-xz", "predict-yz", "predict")),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """What a job gives undisturbed, and the seconds that it takes."""

    hashes: dict[str, str]
    seconds: float


@dataclass
class Stand:
    """The folder of all episodes; each job is run once undisturbed, when it is first needed, and what it gave is kept."""

    place: Path
    workers: int = 2
    references: dict[str, Reference] = field(default_factory=dict)
    commands: int = 0

    def __post_init__(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        self.image = self.place / "em.zarr"
        if not self.image.exists():
            self._quietly("synth", str(self.image), "--shape", SHAPE, "--seed", "12")

    @property
    def env(self) -> dict[str, str]:
        return {"VOLSEG_CACHE": str(self.place / "cache"), "COLUMNS": "200"}

    @property
    def finished(self) -> Path:
        """A finished run, whose probabilities other jobs take."""
        self.reference("infer")
        return self.place / "reference-infer" / "run.volseg.zarr"

    def line(self, job: str, out: Path | str, *more: str) -> list[str]:
        """The command line of a job."""
        kind = JOBS[job]
        sets = [part for text in (*SETTINGS, *kind.sets) for part in ("--set", text)]
        if kind.source == "run":
            sets = [part for text in kind.sets for part in ("--set", text)]
            return volseg("segment", str(out), *sets, *more)
        workers = ("--workers", str(self.workers), "--out", str(out))
        if kind.source == "image":
            return volseg("infer", str(self.image), *workers, *sets, *more)
        channels = ("--mask-channel", "0", "--contour-channel", "1")
        return volseg("segment", f"{self.finished}/0", *channels, *workers, *sets, *more)

    def start(self, line: list[str], env: dict[str, str] | None = None) -> Command:
        self.commands += 1
        return Command(line, self.place / "logs" / f"{self.commands:05d}.txt", {**self.env, **(env or {})})

    def reference(self, job: str) -> Reference:
        """What the job gives undisturbed."""
        kept = self.place / f"reference-{job}.json"
        if job not in self.references and kept.exists():
            self.references[job] = Reference(**json.loads(kept.read_text()))
        if job not in self.references:
            folder = self.place / f"reference-{job}"
            shutil.rmtree(folder, ignore_errors=True)
            out = self.prepare(job, folder)
            begin = time.monotonic()
            command = self.start(self.line(job, out))
            if command.wait() != 0:
                raise SystemExit(f"the undisturbed command failed: {' '.join(command.line)}\n{command.text[-2000:]}")
            self.references[job] = Reference(hash_result(out), time.monotonic() - begin)
            kept.write_text(json.dumps(asdict(self.references[job])))
        return self.references[job]

    def prepare(self, job: str, folder: Path | None = None) -> Path:
        """The output of a job that is about to begin, in an empty folder."""
        folder = folder or self.place / "episode"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        out = folder / "run.volseg.zarr"
        if JOBS[job].source == "run":
            shutil.copytree(self.finished, out)
        return out

    def again(self, episode: Episode, line: list[str], out: Path, env: dict[str, str] | None = None) -> Episode:
        """The same command until it is done, at most `RESTARTS` times; then its result is judged."""
        expected = self.reference(episode.job).hashes
        for _ in range(RESTARTS):
            if (episode.codes and episode.codes[-1] == 0) or episode.outcome == BLOCKED:
                break
            if episode.ended(self.start(line, env)) == 2 and EXISTS in episode.notes[-1]:
                break  # the command before had been done when it was hit
        return episode.judge(out, expected)

    def _quietly(self, *arguments: str) -> None:
        done = subprocess.run(volseg(*arguments), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"volseg {' '.join(arguments)} failed: {done.stderr[-2000:]}")


def wait_for_moment(command: Command, out: Path, job: str, seconds: float, rng: Random) -> str:
    """Waits for a random moment of a command: some seconds, or the first markers of a stage; `""` where it ended before."""
    if rng.random() < 0.3:
        delay = rng.uniform(0.1, 1.0) * seconds
        deadline = time.monotonic() + delay
        while command.alive and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return f"after {delay:.1f} s" if command.alive else ""
    stage, count = rng.choice(JOBS[job].stages), rng.choice((1, 1, 2, 4))
    pause = rng.choice((0, 0, 0.01, 0.05, 0.2))
    return wait_for_stage(command, out, stage, count, pause)


def wait_for_stage(command: Command, out: Path, stage: str, count: int = 1, pause: float = 0) -> str:
    """Waits for the first markers of a stage, and then a little; `""` where the command ended before."""
    partial = Path(f"{out}.partial")
    while command.alive:
        if stage == SUMMARY:
            reached = (partial / "run.json").exists() or (partial / "overlay.png").exists()
        else:
            folder = partial / "work/markers" / stage
            names = list(folder.iterdir()) if folder.is_dir() else []
            reached = len(names) >= (count if stage not in ("stitch", "rank", "pyramid1") else 1)
        if reached:
            time.sleep(pause)
            return f"{stage} {count}" if command.alive else ""
        time.sleep(POLL_S)
    return ""
