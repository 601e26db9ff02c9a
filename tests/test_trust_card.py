"""The card of what was done to break the package follows from its records, and says what was not run."""

import json

import pytest

from eval.trust_card import CARDS, SECTIONS, trust_card

COMMITTED = {
    name: json.loads(path.read_text()) for name in SECTIONS if (path := CARDS / "trust" / f"{name}.json").exists()
}


def test_the_committed_card_is_that_of_its_records():
    assert (CARDS / "trust.md").read_text() == trust_card(COMMITTED)


def test_what_left_no_record_is_said_not_to_have_been_run():
    card = trust_card({})
    for title, command, _ in SECTIONS.values():
        assert f"## {title}\n\nNot run: `{command}` left no record." in card


@pytest.mark.parametrize("field", ["lost", "doubled"])
def test_samples_lost_are_not_hidden(field):
    record = json.loads(json.dumps(COMMITTED["sharding"]))
    record["rows"][0][field] = 77
    assert "| 77 |" in trust_card({"sharding": record})


def test_a_run_that_differs_shows():
    record = COMMITTED["interruptions"]
    assert f"**{record['runs']} of {record['runs']}**" in trust_card({"interruptions": record})
    worse = record | {"identical": record["identical"] - 1}
    assert f"**{record['runs'] - 1} of {record['runs']}**" in trust_card({"interruptions": worse})


def test_failures_of_the_mixins_are_counted():
    record = json.loads(json.dumps(COMMITTED["conformance"]))
    record["counts"]["Span"]["failed"] = 41
    assert "| 41 |" in trust_card({"conformance": record})
