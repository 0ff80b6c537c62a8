"""A finished run is recognised by the hash of what its figures depend on."""

from __future__ import annotations

import json

import pytest

from moezoo_train.experiments.common.records import fingerprint, read_record, write_record

IDENTITY = {"moezoo": "0.1.0", "seed": 3, "rates": (0.1, 0.2), "data": {"source": "stdlib"}}
# Pinned: another hash would repeat every run that users have finished.
HASH = "1e1de2f3fc3568e8"


def test_hashes_stay_as_they_are():
    assert fingerprint(IDENTITY) == HASH
    assert fingerprint(dict(reversed(IDENTITY.items()))) == HASH


def test_a_record_is_recognised_with_the_same_identity_only(tmp_path):
    path = tmp_path / "run" / "result.json"
    write_record(path, IDENTITY, figures={"loss": 1.5})
    found = read_record(path, IDENTITY)
    assert found is not None
    assert found["figures"] == {"loss": 1.5}
    assert found["identity"]["rates"] == [0.1, 0.2]
    assert read_record(path, {**IDENTITY, "seed": 4}) is None
    assert read_record(tmp_path / "none.json", IDENTITY) is None


@pytest.mark.parametrize(
    "earlier",
    [
        {"hash": HASH},  # as background.json was
        {"hash": HASH, "outcome": {"new_facts": 0.5}},  # as compare forgetting wrote
        {"run": "moe-3", "hash": HASH, "identity": {}, "val_loss": 2.0},  # as compare does
    ],
)
def test_records_of_earlier_versions_are_recognised(earlier, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(earlier))
    assert read_record(path, IDENTITY) == earlier


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"hash": 1}', "{}"])
def test_a_damaged_record_is_no_finished_run(damaged, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(damaged)
    assert read_record(path, IDENTITY) is None
