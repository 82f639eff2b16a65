"""docker/: what the images are built from exists, and the cluster's commands run as compose.yaml has them."""

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml

from volseg import cli
from volseg.config import Cluster
from volseg.engine import cluster, loop

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
linux = pytest.mark.skipif(sys.platform != "linux", reason="the images are Linux")


# ---------------------------------------------------------------- reading the files


@cache
def stages() -> dict[str, list[tuple[str, str]]]:
    """(instruction, rest) of each line of the Dockerfile, by stage."""
    text = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {"": []}  # before the first stage: arguments of all
    lines = found[""]
    for line in filter(str.strip, text.splitlines()):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            lines = found[rest.split()[-1]] = []
        lines.append((word, rest))
    return found


def every(word: str) -> list[str]:
    """What follows each such instruction, over all stages."""
    return [rest for lines in stages().values() for found, rest in lines if found == word]


@cache
def services() -> dict[str, dict]:
    return yaml.safe_load((ROOT / "docker/compose.yaml").read_text(encoding="utf-8"))["services"]


def words(service: str) -> list[str]:
    """The program and arguments that compose starts in a service."""
    entry = services()[service].get("entrypoint") or " ".join(json.loads(every("ENTRYPOINT")[-1]))
    return [*shlex.split(entry), *shlex.split(services()[service]["command"])]


def environment(service: str) -> dict[str, str]:
    """A service's environment where none of compose's variables is set."""
    given = services()[service].get("environment", {})
    return {name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) for name, value in given.items()}


# ---------------------------------------------------------------- the images


def test_the_dockerfile_has_a_target_for_each_kind_of_machine():
    assert {"cpu", "gpu"} <= set(stages())


def test_what_is_copied_is_in_the_repository_and_goes_to_the_engine():
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    sources = {source for rest in every("COPY") for source in rest.split()[:-1]}
    assert "requirements.lock" in sources
    assert "*" in ignore
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignore


def test_all_that_the_wheel_holds_is_copied():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    target = build["tool"]["hatch"]["build"]["targets"]["wheel"]
    project = build["project"]
    needed = {
        "pyproject.toml",
        project["readme"],
        *project["license-files"],
        *target["packages"],
        *target["force-include"],
    }
    copied = {source for word, rest in stages()["wheel"] if word == "COPY" for source in rest.split()[:-1]}
    assert needed <= copied


@linux
def test_every_program_of_the_images_and_services_exists():
    runs = [re.sub(r"^(--\S+\s+)+", "", rest) for rest in every("RUN")]
    commands = [shlex.split(part) for rest in runs for part in rest.split("&&")] + [words(name) for name in services()]
    missing = {program for program, *_ in commands if not shutil.which(program, path=PROGRAMS)}
    assert not missing


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_does_not_run_as_root(target: str):
    user = [rest for word, rest in stages()[target] if word == "USER"][-1]
    assert user.split(":")[0] not in ("root", "0")


def test_no_registry_is_named():
    text = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
    assert "://" not in text
    assert "index-url" not in text


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="CUDA wheels are for Linux on x86-64"
)
def test_the_cuda_libraries_are_where_the_gpu_image_looks():
    given = dict(part.split("=", 1) for rest in every("ENV") for part in rest.split())
    folders = given["LD_LIBRARY_PATH"].split(":")
    ((argument, base),) = stages()[""]
    assert argument == "ARG"
    assert all(rest.split()[0] in {"${BASE}", *stages()} for rest in every("FROM"))
    python = re.fullmatch(r"BASE=python:(\S+)-slim", base)[1]
    assert all(folder.startswith(f"/usr/local/lib/python{python}/site-packages/") for folder in folders)
    packages = Path(sysconfig.get_path("purelib"))
    if not (packages / "nvidia").is_dir():
        pytest.skip("torch is installed without CUDA here")
    assert all((packages / folder.partition("site-packages/")[2]).is_dir() for folder in folders)


# ---------------------------------------------------------------- compose.yaml


def test_services_build_targets_that_exist():
    for service in services().values():
        build = service["build"]
        assert (ROOT / "docker" / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
        assert build["target"] in stages()
        assert service["image"] == f"volseg:{build['target']}"


def test_what_a_service_waits_for_needs_no_profile():
    for service in services().values():
        assert not any("profiles" in services()[name] for name in service.get("depends_on", ()))


def test_workers_of_two_kinds_are_never_started_together():
    assert services()["worker"]["profiles"] != services()["gpu-worker"]["profiles"]
    assert services()["gpu-worker"]["deploy"] == services()["gpu-infer"]["deploy"]


def test_the_dashboard_is_published_to_this_machine_alone():
    published = [port for service in services().values() for port in service.get("ports", ())]
    assert published == ["127.0.0.1:8787:8787"]


@pytest.mark.parametrize("service", ["infer", "gpu-infer"])
def test_a_run_in_compose_is_one_the_command_line_takes(service: str):
    program, name, *rest = words(service)
    given = typer.main.get_command(cli.app).commands[name].make_context(name, rest).params
    assert (program, given["volume"], given["scheduler"]) == ("volseg", "/data/volume.zarr", "tcp://scheduler:8786")


# ---------------------------------------------------------------- the cluster, really


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


def on_loopback(text: str, ports: dict[str, int]) -> str:
    """Text of compose.yaml with this machine's loopback and ports for the hosts and ports in it."""
    text = re.sub(r"(?<=//)scheduler(?=:)|0\.0\.0\.0", "127.0.0.1", text)
    return re.sub(r"\b878[67]\b", lambda found: str(ports[found[0]]), text)


@contextlib.contextmanager
def started(service: str, ports: dict[str, int], log: Path) -> Iterator[subprocess.Popen]:
    """The service's process, started as compose would; afterwards it has stopped when asked to, and its children with it."""
    program, *rest = (on_loopback(word, ports) for word in words(service))
    command = [shutil.which(program, path=PROGRAMS), *rest]
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command,
            env=os.environ | environment(service),
            stdout=out,
            stderr=out,
            cwd=log.parent,
            start_new_session=True,
        )
    try:
        yield process
        assert process.poll() is None, log.read_text()
        process.terminate()
        process.wait(15)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_healthy(service: str, ports: dict[str, int], running: dict[Path, subprocess.Popen]) -> None:
    """The service's health check passes; refuses when a process has ended (its log is in the error) or after a minute."""
    kind, python, *rest = (on_loopback(word, ports) for word in services()[service]["healthcheck"]["test"])
    assert (kind, python) == ("CMD", "python")
    deadline = time.monotonic() + 60
    while subprocess.run([sys.executable, *rest], capture_output=True).returncode:
        for log, process in running.items():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@linux
def test_scheduler_and_worker_of_compose_do_volsegs_work(tmp_path: Path):
    ports = dict(zip(("8786", "8787"), free_ports(2), strict=True))
    results = {}

    def square(item: int) -> tuple[int, int]:
        return item * item, cluster.threads_here()

    logs = tmp_path / "scheduler.log", tmp_path / "worker.log"
    with started("scheduler", ports, logs[0]) as scheduler, started("worker", ports, logs[1]) as worker:
        wait_until_healthy("scheduler", ports, dict(zip(logs, (scheduler, worker), strict=True)))
        options = Cluster(scheduler=on_loopback("tcp://scheduler:8786", ports))
        with cluster.connect(options) as client:
            failures = loop.run(client, square, range(5), done=results.__setitem__)

    assert failures == []
    assert results == {item: (item * item, int(environment("worker")["VOLSEG_THREADS"])) for item in range(5)}
