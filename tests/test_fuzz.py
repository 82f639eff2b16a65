"""Files changed at random are read, or refused in one line; seeds that once ended otherwise are kept."""

import random
import shutil
import subprocess
import sys

import pytest

from benchmarks import fuzz
from tests.corpus.test_corpus import tiny_run  # noqa: F401
from tests.helpers import ROOT

KEPT = [  # a kind of `fuzz.Fuzzer` and a seed
    ("TOML", "0-TOML-226"),
    ("runs", "0-runs-17"),
    ("runs", "3-runs-23"),
    ("OME metadata", "0-OME metadata-270"),
]


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory, tiny_run):  # noqa: F811
    place = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(tiny_run / "run.zarr", place / "run.zarr")
    return fuzz.Fuzzer(place, place / "run.zarr")


def test_files_changed_at_random_end_in_no_traceback(fuzzer):
    outcomes = fuzz.run_cases(fuzzer, cases=240, seed=1)
    assert [failure for outcome in outcomes.values() for failure in outcome.failures] == []
    assert all(outcome.counts["read"] + outcome.counts["refused"] == 40 for outcome in outcomes.values())
    assert max(outcome.worst_bytes for outcome in outcomes.values()) < 300 << 20


@pytest.mark.parametrize(("kind", "seed"), KEPT)
def test_seeds_that_once_ended_in_a_traceback_do_not(fuzzer, kind, seed):
    outcome = fuzz.Outcome()
    fuzz.run_case(fuzzer.kinds[kind], seed, outcome)
    assert outcome.failures == []


COUNTED = """
from benchmarks import fuzz
from volseg.errors import UserError

def broken(rng):
    raise KeyError(rng.random())

def endless(rng):
    while True:
        rng.random()

def refused(rng):
    raise UserError("no such file")

fuzz.HANG_S = 1.0
outcome = fuzz.Outcome()
for case in (broken, endless, refused, lambda rng: None):
    fuzz.run_case(case, "1", outcome)
assert outcome.counts == {"tracebacks": 1, "hangs": 1, "refused": 1, "read": 1}, outcome
assert [seed for seed, _ in outcome.failures] == ["1", "1"], outcome
"""


def test_a_traceback_and_a_case_without_end_are_counted():
    """In a process of its own: the alarm that ends a case is one that the suite's time limits use as well."""
    ended = subprocess.run([sys.executable, "-c", COUNTED], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


def test_a_seed_gives_the_same_change():
    plain = {"a": [1, 2, {"b": "c"}], "d": None}
    changes = [fuzz.text_of(fuzz.changed(plain, random.Random(7)), random.Random(7)) for _ in range(2)]
    assert changes[0] == changes[1]
    assert plain == {"a": [1, 2, {"b": "c"}], "d": None}
