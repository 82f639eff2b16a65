"""Workers on hosts of their own, of which one is lost, under TLS, with data in an S3 store; all over a network."""

import pytest

from benchmarks import hosts, report


@pytest.mark.skipif(bool(hosts.available()), reason=f"hosts cannot be made: {hosts.available()}")
def test_a_host_that_is_lost_costs_its_blocks_in_flight_alone(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(hosts, "SETTINGS", ("blocks.shape=[11,75,85]", *hosts.SETTINGS[1:]))  # 8 blocks
    (row,) = hosts.measure(f"{reference}/0", events=("a host is lost, another comes",))
    assert row["markers by then"] > 0
    assert (row["exit code"], row["same bytes"]) == (0, True)
