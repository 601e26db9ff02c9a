import json
import subprocess

import pytest

from eval import audit


@pytest.mark.parametrize(
    ("licence", "kind"),
    [
        ("MIT", "permissive"),
        ("MIT-CMU", "permissive"),
        ("3-Clause BSD License", "permissive"),
        ("Apache Software License; BSD License", "permissive"),
        ("Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND BSD-2-Clause AND BSL-1.0", "permissive"),
        ("Apache-2.0 OR GPL-2.0-only", "permissive"),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", "weak copyleft"),
        ("GNU Lesser General Public License v2 or later (LGPLv2+)", "weak copyleft"),
        ("GNU General Public License v3 (GPLv3)", "strong copyleft"),
        ("MIT AND AGPL-3.0-only", "strong copyleft"),
        ("Limited", "unknown"),
        ("UNKNOWN", "unknown"),
        ("MIT AND Custom", "unknown"),
    ],
)
def test_kinds_of_licences(licence, kind):
    assert audit.kind_of(licence) == kind


def answer(**listed):
    return subprocess.CompletedProcess([], 1, json.dumps({"dependencies": listed["of"]}), "")


def test_vulnerabilities_are_listed(tmp_path, monkeypatch):
    bug = {"id": "GHSA-1", "fix_versions": ["2.0"], "aliases": []}
    of = [{"name": "a", "version": "1.0", "vulns": [bug]}, {"name": "b", "version": "1.0", "vulns": []}]
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(audit, "_run", lambda *options, check=True: answer(of=of))
    found = audit.vulnerabilities(tmp_path / "constraints.txt")
    assert found["packages"] == 2
    assert found["found"] == [{"package": "a", "version": "1.0", "id": "GHSA-1", "fixed_in": ["2.0"]}]


def test_what_was_not_looked_up_is_not_called_sound(tmp_path, monkeypatch):
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(audit, "_run", lambda *options, check=True: answer(of=[{"name": "a", "skip_reason": "gone"}]))
    assert "gone" in audit.vulnerabilities(tmp_path)["not_run"]
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nConnectionError: no such host")
    monkeypatch.setattr(audit, "_run", lambda *options, check=True: failed)
    assert audit.vulnerabilities(tmp_path) == {"not_run": "pip-audit ended with 1: ConnectionError: no such host"}
    monkeypatch.setattr(audit.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in audit.vulnerabilities(tmp_path)["not_run"]
