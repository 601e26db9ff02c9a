"""Audits what the project depends on: known vulnerabilities, and licences beside Apache 2.0.

    python -m eval.audit --out runs/audit.json [--constraints constraints.txt]

Vulnerabilities are those that pip-audit finds for the versions of `constraints.txt`; without its service they are "not
run", which says nothing about them. Licences are what pip-licenses reads off the packages that are installed here.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.provenance import provenance, write_json

OWN = "leviathan-sna"
SECONDS = 600  # for pip-audit, which asks for one package after another

# Words by which a licence is known, in lower case; these go with Apache 2.0 without conditions on the whole.
PERMISSIVE = (
    "academic free", "apache", "0bsd", "bsd", "bsl-1.0", "boost", "cc0", "cnri-python", "dfsg approved", "isc", "mit",
    "ncsa", "psf", "python software foundation", "unlicense", "zlib", "zpl",
)  # fmt: skip
# Conditions on the package's own files, or on its replacement: used as a library, unchanged, it binds nothing of ours.
WEAK_COPYLEFT = ("mpl", "mozilla", "lgpl", "lesser general public", "eclipse", "epl-")
STRONG_COPYLEFT = ("gpl", "general public", "agpl", "affero", "sspl", "cc-by-sa", "cc-by-nc", "proprietary", "eula")
KINDS = {"weak copyleft": WEAK_COPYLEFT, "strong copyleft": STRONG_COPYLEFT, "permissive": PERMISSIVE}
STRICTNESS = ("permissive", "weak copyleft", "unknown", "strong copyleft")
INNERMOST = re.compile(r"\(([^()]*\b(?:AND|OR)\b[^()]*)\)")  # brackets that an expression has, not a name


@dataclass(frozen=True)
class Licence:
    """Of an installed package.

    Attributes:
        package: Its name.
        version: Its version.
        licence: As the package says, its first line.
        kind: `permissive`, `weak copyleft`, `strong copyleft` or `unknown`.
    """

    package: str
    version: str
    licence: str
    kind: str


def kind_of(licence: str) -> str:
    """The kind of a licence, by its name or an SPDX expression: of alternatives the mildest, of several the strictest.

    `permissive`, `weak copyleft`, `strong copyleft`, or `unknown` if a part is none of those listed.
    """
    expression = licence.strip().split("\n")[0]
    while group := INNERMOST.search(expression):
        expression = expression.replace(group[0], kind_of(group[1]))
    alternatives = [
        max(map(_kind_of_one, re.split(r"\bAND\b|;", each)), key=STRICTNESS.index)
        for each in re.split(r"\bOR\b", expression)
    ]
    return min(alternatives, key=STRICTNESS.index)


def _kind_of_one(name: str) -> str:
    name = name.strip().lower()
    if name in STRICTNESS:  # of a group in brackets
        return name
    for kind, words in KINDS.items():
        if any(re.search(rf"(?<![a-z]){re.escape(word)}", name) for word in words):
            return kind
    return "unknown"


def licences() -> list[Licence]:
    """Of all packages in this environment, by name.

    Raises:
        RuntimeError: If pip-licenses fails.
    """
    done = _run("piplicenses", "--format=json", "--from=mixed", "--with-system")
    found = []
    for entry in sorted(json.loads(done.stdout), key=lambda entry: entry["Name"].lower()):
        if entry["Name"] != OWN:
            licence = entry["License"].strip().split("\n")[0]
            found.append(Licence(entry["Name"], entry["Version"], licence, kind_of(licence)))
    return found


def vulnerabilities(constraints: Path, service: str = "pypi") -> dict[str, Any]:
    """Known ones of the versions in a file, as PyPI or OSV know them.

    Returns:
        `packages`, how many were looked up; `found`, for each vulnerability its package, version, id and the versions
        that mend it; `skipped`, packages that could not be looked up, and why. Or `not_run`, the reason, alone.
    """
    if importlib.util.find_spec("pip_audit") is None:
        return {"not_run": "pip-audit is not installed (extra audit)"}
    options = (
        "--requirement",
        str(constraints),
        "--no-deps",
        "--disable-pip",
        "--format",
        "json",
        "--vulnerability-service",
        service,
    )
    try:
        done = _run("pip_audit", *options, "--progress-spinner", "off", "--timeout", "15", check=False)
    except subprocess.TimeoutExpired:
        return {"not_run": f"the service did not answer within {SECONDS} s"}
    try:
        listed = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):  # it prints no JSON unless it has an answer
        lines = done.stderr.strip().splitlines() or ["no output"]
        return {"not_run": f"pip-audit ended with {done.returncode}: {lines[-1]:.300}"}
    found = [
        {"package": each["name"], "version": each["version"], "id": bug["id"], "fixed_in": bug["fix_versions"]}
        for each in listed
        for bug in each.get("vulns", [])
    ]
    if listed and all("skip_reason" in each for each in listed):
        return {"not_run": f"{service} knows none of the {len(listed)} packages here: {listed[0]['skip_reason']}"}
    skipped = {each["name"]: each["skip_reason"] for each in listed if "skip_reason" in each}
    return {"packages": len(listed) - len(skipped), "found": found, "skipped": skipped}


def _run(module: str, *options: str, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", module, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)  # noqa: S603 -- ours
    if check and done.returncode:
        raise RuntimeError(f"{module} fails: {done.stderr.strip()}")
    return done


def summary(found: dict[str, Any]) -> str:
    """What needs a look, as lines of text."""
    bugs = found["vulnerabilities"]
    if "not_run" in bugs:
        lines = [f"vulnerabilities: NOT RUN: {bugs['not_run']}"]
    else:
        lines = [
            f"vulnerabilities: {len(bugs['found'])} in {bugs['packages']} packages, {len(bugs['skipped'])} skipped"
        ]
        lines += [f"  {each['package']} {each['version']}: {each['id']}" for each in bugs["found"]]
    lines.append("licences: " + ", ".join(f"{count} {kind}" for kind, count in found["licence_kinds"].items()))
    lines += [
        f"  {each['package']} {each['version']}: {each['licence']} ({each['kind']})"
        for each in found["licences"]
        if each["kind"] != "permissive"
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--constraints", type=Path, default=Path("constraints.txt"), help="versions to look up")
    parser.add_argument("--service", choices=("pypi", "osv"), default="pypi", help="who is asked for vulnerabilities")
    known = parser.parse_args(arguments)
    if not known.constraints.is_file():
        parser.error(f"there is no file {known.constraints}; run from the checkout, or name the file of versions")
    each = licences()
    kinds = [licence.kind for licence in each]
    found = {
        "vulnerabilities": vulnerabilities(known.constraints, known.service),
        "licence_kinds": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "licences": [asdict(licence) for licence in each],
        "provenance": provenance(),
    }
    write_json(known.out, found)
    print(summary(found))
    return found


if __name__ == "__main__":
    main()
