"""transformers' own tests, run on ours: what is said of their outcome. The run itself downloads, and is a command."""

import ast

import pytest

import leviathan
from eval import conformance

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_leviathan_sna.LeviathanTest" name="test_save_load"/>
<testcase classname="tests.test_leviathan_sna.LeviathanTest" name="test_resize_embeddings_untied">
<failure message="TypeError: no"/></testcase>
<testcase classname="tests.test_leviathan_sna.SpanTest" name="test_save_load">
<error message=" bad&#10;worse"/></testcase>
<testcase classname="tests.test_leviathan_sna.SpanTest" name="test_cpu_offload"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_outcomes_are_read_and_what_cannot_hold_is_named(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    rows = conformance.read_report(tmp_path / "report.xml")
    assert [row["outcome"] for row in rows] == ["passed", "expected", "failed", "skipped"]
    assert rows[1]["message"] == conformance.TABLE
    assert rows[2] == {"model": "Span", "test": "test_save_load", "outcome": "failed", "message": "bad"}


def test_what_cannot_hold_for_some_models_is_no_excuse_for_others():
    assert conformance.why_expected("Vsna", "test_training")
    assert not conformance.why_expected("Khronos", "test_training")
    assert conformance.why_expected("Khronos", "test_hidden_states_output")
    assert not conformance.why_expected("LeviathanLookup", "test_hidden_states_output")
    assert not conformance.why_expected("Leviathan", "test_save_load")


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no checkout of transformers"):
        conformance.lay_out(tmp_path / "tree", "5.23.0", tmp_path)


def test_the_suite_has_all_models():
    source = conformance.SUITE.read_text()
    named = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    models = {name for name in leviathan.__all__ if name.endswith(("Model", "CausalLM", "Classification"))}
    assert models - {"LeviathanPreTrainedModel"} <= named
    assert "FieldTokenizer" in named
