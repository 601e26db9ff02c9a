"""The committed card of VSNA, and the tables and words that compare its rows."""

import json
import re
from pathlib import Path

from eval.vsna_card import frontier_table, goals_table, targets_table, vsna_card
from eval.vsna_words import frontier_words, goal_words, rank_words, speed_up_words

CARDS = Path(__file__).resolve().parent.parent / "model_cards"


def test_the_committed_card_is_what_its_record_generates():
    study = json.loads((CARDS / "vsna" / "vsna.json").read_text(encoding="utf-8"))
    remarks = (CARDS / "vsna" / "remarks.md").read_text(encoding="utf-8")
    text = (CARDS / "vsna.md").read_text(encoding="utf-8")
    assert text == vsna_card(study, "vsna", remarks)
    assert all((CARDS / link).is_file() for link in re.findall(r"\]\((vsna/[^)]+)\)", text))
    assert not study["small"]


def test_targets_are_reached_or_not():
    rows = [
        {"figure": "an error", "asked": "<= 1", "measured": measured, "reached": reached}
        for measured, reached in ((0.5, True), (2.0, False), (None, None))
    ]
    lines = targets_table({"targets": rows}).splitlines()[2:]
    assert lines == [
        "| an error | <= 1 | 0.5 | reached |",
        "| an error | <= 1 | 2 | **not reached** |",
        "| an error | <= 1 |  | not measured |",
    ]


def test_whoever_is_faster_is_said_to_be():
    goals = [
        {"problem": "heat", "goal": 0.1, "seconds": {"cp": 4.0, "train": 1.0, "amen": 2.0, "pinn": 8.0}},
        {"problem": "heat", "goal": 0.01, "seconds": {"train": 8.0, "amen": 2.0}},
        {"problem": "heat", "goal": 0.001, "seconds": {"amen": 4.0}},
        {"problem": "plume", "goal": 0.1, "seconds": {"train": 8.0}},
    ]
    heat, plume = goal_words(goals)
    assert heat == (
        "Heat, for all diffusivities: VSNA is faster than torchTT's AMEn to errors of 0.1 (2 times); slower than "
        "torchTT's AMEn to errors of 0.01 (4 times) and 0.001 (which VSNA's fields do not reach)."
    )
    assert plume == "Plume in six inputs: VSNA is alone at 0.1."
    lines = goals_table({"goals": goals}).splitlines()[2:]
    assert lines[0] == "| heat, for all diffusivities | 0.1 | **1** | 4 | 2 | 8 |  |"
    assert lines[2] == "| heat, for all diffusivities | 0.001 |  |  | **4** |  |  |"


def test_greedy_sums_are_compared_at_equal_rank():
    rows = [
        {"problem": "heat", "method": method, "rank": rank, "relative_l2": error}
        for method, rank, error in (
            ("cp", 2, 0.5),
            ("cp", 4, 0.01),
            ("cp", 8, 1e-4),
            ("greedy", 2, 0.5),
            ("greedy", 4, 0.2),
        )
    ]
    (words,) = rank_words(rows)
    assert words.startswith(
        "Heat, for all diffusivities: of 4 products the greedy sum has 20 times the error of the one"
    )


def test_a_query_pays_or_never_does():
    row = {"problem": "laser", "method": "P2", "size": "8 cells", "num_points": 1000, "element_error": 1e-3}
    row |= {"field_error": 2e-3, "element_seconds": 0.5, "field_seconds": 0.25, "scattered_seconds": 1.0, "ratio": 2.0}
    row |= {"offline_seconds": 10.0, "break_even": 40}
    slower = row | {"element_error": 4e-3, "field_seconds": 1.0, "ratio": 0.5, "break_even": None}
    pays, never = speed_up_words([row, slower])
    assert "elements of degree 2 (8 cells; error 1.0e-03, the field's 2.0e-03: as accurate as the field)" in pays
    assert "0.25 s, 2 times as fast" in pays
    assert pays.endswith("With its solve of 10 s the field has paid after 40 queries on nodes.")
    assert "the most accurate that were tried, and less so" in never
    assert "the field never pays" in never


def test_frontier_beside_the_published_line():
    def row(seed, error):
        about = {"form": "cp", "num_cells": 32, "rank": 20, "num_parameters": 10_000, "seconds": 60.0 + seed}
        return about | {"relative_l2": error, "seed": seed}

    part = {"rows": [row(0, 1e-3), row(1, 1.5e-3)], "slopes": {"cp": -1.75, "tucker": None}}
    cp, spread = frontier_words(part)
    assert cp == (
        "Cp: slope -1.75 (published -0.68); the most accurate field has 10,000 parameters and an error of 1.00e-03, "
        "where the published line is at 4.57e-04."
    )
    assert spread.endswith("differs by up to 50 %.")
    (line,) = frontier_table(part).splitlines()[2:]
    assert line == "| cp | 32 | 20 | 10,000 | 1.25e-03 (at most 1.50e-03) | 2 | 60 |"
