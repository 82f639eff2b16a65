"""Faults of disks: full, turned read-only, and without power. They need root, and the last a loop device."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

from benchmarks.chaos.episode import Episode, skipped
from benchmarks.chaos.stand import Stand, wait_for_moment

ROOM_KB = (64, 192, 384, 768, 1024, 1536)  # of a disk that is too small
DISK_MB = 64
EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2  # linux/ext4.h: what is in memory alone is gone, as in a power cut
AFTER_END_S = (0, 0, 0.02, 0.5, 3)


class NotAllowedError(Exception):
    """This machine does not let us mount."""


@contextmanager
def _mounted(place: Path, *arguments: str) -> Iterator[Path]:
    """Inside, a file system is mounted at ``place``, as the arguments of ``mount`` say."""
    place.mkdir(exist_ok=True)
    _mount(*arguments, str(place))
    try:
        yield place
    finally:
        _unmount(place)


def _mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise NotAllowedError("there is no mount") from error
    if done.returncode:
        raise NotAllowedError(done.stderr.strip())


def _unmount(place: Path) -> None:
    for _ in range(50):
        if subprocess.run(["umount", str(place)], capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run(["umount", "-l", str(place)], check=False)


def full(stand: Stand, rng: Random, episode: Episode) -> Episode:
    """The disk is too small, and still is when the command is given again; then it grows."""
    stand.reference(episode.job)
    room = rng.choice(ROOM_KB)
    try:
        with _mounted(stand.place / "small", "-t", "tmpfs", "-o", f"size={room}k", "tmpfs") as disk:
            out = disk / "run.volseg.zarr"
            line = stand.line(episode.job, out)
            for _ in range(2):
                if not episode.codes or episode.codes[-1]:
                    episode.faults += episode.ended(stand.start(line)) != 0
            _mount("-o", "remount,size=400m", str(disk))
            episode.notes.append(f"{room} kB")
            return stand.again(episode, line, out)
    except NotAllowedError as error:
        return skipped(episode, f"mounting a tmpfs: {error}")


def read_only(stand: Stand, rng: Random, episode: Episode) -> Episode:
    """The disk turns read-only at a random moment, as the system does with a failing one; then it can be written again."""
    reference = stand.reference(episode.job)
    try:
        with _mounted(stand.place / "read-only", "-t", "tmpfs", "-o", "size=400m", "tmpfs") as disk:
            out = disk / "run.volseg.zarr"
            line = stand.line(episode.job, out)
            command = stand.start(line)
            moment = wait_for_moment(command, out, episode.job, reference.seconds, rng)
            while moment and command.alive:  # refused while any file is open for writing
                with suppress(NotAllowedError):
                    _mount("-o", "remount,ro", str(disk))
                    episode.faults += 1
                    break
                time.sleep(0.005)
            episode.notes.append(moment)
            episode.ended(command)
            _mount("-o", "remount,rw", str(disk))
            return stand.again(episode, line, out)
    except NotAllowedError as error:
        return skipped(episode, f"mounting a tmpfs: {error}")


def power_cut(stand: Stand, rng: Random, episode: Episode, *, ended: bool = False) -> Episode:
    """The power goes at a random moment, or just after the command has said that it is done; then it is given again.

    The output is on an ext4 of its own in a file. It is shut down without flushing its journal, so what was not synced is
    gone, and mounted again.
    """
    reference, place = stand.reference(episode.job), stand.place / "disk"
    image = stand.place / "disk.img"
    try:
        with _ext4(image, place, commit=rng.choice((1, 5))) as disk:
            out = disk / "run.volseg.zarr"
            line = stand.line(episode.job, out)
            command = stand.start(line)
            if ended:
                episode.ended(command)
                time.sleep(rng.choice(AFTER_END_S))
            else:
                moment = wait_for_moment(command, out, episode.job, reference.seconds, rng)
                time.sleep(rng.choice((0, 0, 0.3, 1.5)))
                episode.notes.append(moment)
            done = not command.alive and command.process.returncode == 0
            _shut_down(disk)
            command.end()
            episode.faults += 1
            _unmount(disk)
            _mount("-o", "loop", str(image), str(disk))
            episode.notes.append(f"{_stored_files(disk)} files there, {'done' if done else 'under way'}")
            if done:
                episode.codes[:] = [0]  # it must be whole without another command
            return stand.again(episode, line, out)
    except NotAllowedError as error:
        return skipped(episode, f"mounting an ext4 in a file: {error}")


@contextmanager
def _ext4(image: Path, place: Path, *, commit: int) -> Iterator[Path]:
    """Inside, an empty ext4 in a file is mounted, whose journal is written every ``commit`` seconds."""
    with image.open("wb") as file:
        file.truncate(DISK_MB << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise NotAllowedError(str(error)) from error
    with _mounted(place, "-o", f"loop,commit={commit}", str(image)) as disk:
        yield disk
    image.unlink()


def _shut_down(disk: Path) -> None:
    folder = os.open(disk, os.O_RDONLY)
    try:
        fcntl.ioctl(folder, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    except OSError as error:
        raise NotAllowedError(f"EXT4_IOC_SHUTDOWN: {error}") from error
    finally:
        os.close(folder)


def _stored_files(disk: Path) -> int:
    return sum(path.is_file() for path in disk.rglob("*"))


JOBS = ("infer", "segment")
KINDS = {
    "full-disk": (full, JOBS, {}),
    "read-only": (read_only, JOBS, {}),
    "power-cut": (power_cut, (*JOBS, "tree", "holes"), {}),
    "power-cut-after": (power_cut, JOBS, {"ended": True}),
}
