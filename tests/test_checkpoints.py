"""Checkpoints as folders: whole or not there, verified to the bit, rotated, refused with a reason."""

import json
import re
import shutil
from pathlib import Path

import pytest

from training import checkpoints
from training.checkpoints import (
    MANIFEST,
    clear_partial,
    damage,
    differences,
    list_checkpoints,
    newest_whole,
    publish,
    rotate,
)

RECORD = {"settings": {"training": {"seed": 1, "learning_rate": 3e-4}}, "num_processes": 1}


def staged(output, step):
    folder = output / "partial" / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(bytes(range(256)) * 8)
    (folder / "shards" / "0.bin").write_bytes(b"%d" % step)
    return folder


def write(output, *steps, record=RECORD):
    return [publish(staged(output, step), record) for step in steps]


def names(output):
    return [checkpoint.name for checkpoint in list_checkpoints(output)]


def test_what_is_published_is_whole_and_names_its_files(tmp_path):
    (checkpoint,) = write(tmp_path, 6)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    assert (manifest["step"], manifest["run"]) == (6, RECORD)
    assert manifest["files"]["shards/0.bin"] == {
        "bytes": 1,
        "sha256": "e7f6c011776e8db7cd330b54174fd76f7d0216b612387a5ffcfb81e6f0919683",  # of "6"
    }
    assert sorted(manifest["files"]) == ["optimizer.pt", "shards/0.bin"]
    assert damage(checkpoint) is None
    assert newest_whole(tmp_path, RECORD) == checkpoint
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    assert newest_whole(tmp_path / "nowhere", RECORD) is None


def test_one_of_the_same_step_is_never_replaced(tmp_path):
    (checkpoint,) = write(tmp_path, 6)
    with pytest.raises(OSError, match="not empty"):
        write(tmp_path, 6)
    assert damage(checkpoint) is None


def truncate(folder):
    (folder / "optimizer.pt").write_bytes(bytes(1024))


def alter(folder):
    content = bytearray((folder / "optimizer.pt").read_bytes())
    content[77] ^= 1
    (folder / "optimizer.pt").write_bytes(content)


def link(folder):
    shutil.move(folder / "optimizer.pt", folder.parent / "elsewhere.pt")
    (folder / "optimizer.pt").symlink_to(folder.parent / "elsewhere.pt")


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def manifest_with(**changes):
    def change(folder):
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | changes))

    return change


DAMAGES = {
    "truncated": (truncate, "optimizer.pt has 1,024 of 2,048 bytes"),
    "altered": (alter, "optimizer.pt is not what was written (its SHA-256 differs)"),
    "lost": (lambda folder: (folder / "shards" / "0.bin").unlink(), "shards/0.bin is missing"),
    "added": (lambda folder: (folder / "scaler.pt").write_bytes(b"x"), "scaler.pt is none of the files"),
    "linked": (link, "optimizer.pt is a link"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"{MANIFEST} is missing"),
    "no JSON": (lambda folder: (folder / MANIFEST).write_text('{"step": 6'), f"{MANIFEST} cannot be read"),
    "a list": (lambda folder: (folder / MANIFEST).write_text("[1]"), f"{MANIFEST} cannot be read"),
    "nested too deep": (lambda folder: (folder / MANIFEST).write_text("[" * 10**5), f"{MANIFEST} cannot be read"),
    "not text": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), f"{MANIFEST} cannot be read"),
    "no entries": (manifest_with(files={"optimizer.pt": 3}), f"{MANIFEST} cannot be read"),
    "no number": (manifest_with(files={"optimizer.pt": {"bytes": "x", "sha256": ""}}), f"{MANIFEST} cannot be read"),
    "no run": (manifest_with(run=None), f"{MANIFEST} cannot be read"),
    "of another step": (manifest_with(step=5), f"{MANIFEST} is that of step 5"),
    "outside": (manifest_with(files={"../x": {"bytes": 0, "sha256": ""}}), "../x is missing"),
    "empty": (empty, f"{MANIFEST} is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_is_set_aside_and_the_one_before_taken(tmp_path, capsys, name):
    harm, message = DAMAGES[name]
    older, newest = write(tmp_path, 6, 12)
    harm(newest)
    assert newest_whole(tmp_path, RECORD) == older
    told = capsys.readouterr().err
    assert f"checkpoint-12 is not whole: {message}" in told
    assert "now refused-checkpoint-12; going on from checkpoint-6" in told
    assert names(tmp_path) == ["checkpoint-6"]
    assert (tmp_path / "refused-checkpoint-12").is_dir()
    assert newest_whole(tmp_path, RECORD) == older
    assert capsys.readouterr().err == ""


def test_if_none_is_whole_that_is_an_error_and_nothing_is_moved(tmp_path):
    truncate(write(tmp_path, 6)[0])
    alter(write(tmp_path, 12)[0])
    expected = "is whole (checkpoint-12: optimizer.pt is not what was written (its SHA-256 differs); checkpoint-6: opt"
    with pytest.raises(ValueError, match=re.escape(expected)):
        newest_whole(tmp_path, RECORD)
    assert names(tmp_path) == ["checkpoint-12", "checkpoint-6"]


def test_one_of_another_run_is_refused_and_the_one_before_offered(tmp_path):
    other = json.loads(json.dumps(RECORD))
    other["settings"]["training"] |= {"learning_rate": 1e-3, "seed": 2}
    write(tmp_path, 12, record=other)
    message = r"checkpoint-12 is of another run \(settings.training.learning_rate, settings.training.seed differ\); "
    with pytest.raises(ValueError, match=message + "delete it to start anew"):
        newest_whole(tmp_path, RECORD)
    write(tmp_path, 3, 6)
    truncate(tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match=message + "delete it to go on from checkpoint-3"):
        newest_whole(tmp_path, RECORD)
    assert names(tmp_path) == ["checkpoint-12", "checkpoint-6", "checkpoint-3"]


def test_differences_are_named():
    before = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert differences(before, before) == []
    assert differences(before, {"a": {"b": 2, "c": [1, 2]}, "e": 0}) == ["a.b", "d", "e"]


@pytest.mark.parametrize("limit", [None, -1, 0, 1, 2, 3, 9])
@pytest.mark.parametrize("best", [None, 3, 12])
def test_the_oldest_go_and_never_the_newest_or_the_best(tmp_path, limit, best):
    write(tmp_path, 3, 6, 9, 12)
    rotate(tmp_path, limit, None if best is None else Path("elsewhere") / f"checkpoint-{best}")
    kept = {None: 4, -1: 4, 0: 4, 9: 4}.get(limit, limit)
    expected = [12, 9, 6, 3][:kept]
    if best == 3 and kept < 4:
        expected = [*[12, 9][: max(1, kept - 1)], 3]
    assert names(tmp_path) == [f"checkpoint-{step}" for step in expected]
    assert not (tmp_path / "partial").exists()


def test_without_checkpoints_none_go(tmp_path):
    rotate(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_folders_of_other_names_are_no_checkpoints(tmp_path):
    write(tmp_path, 100, 20)
    for name in ("checkpoint-", "checkpoint-last", "checkpoint-5.partial", "refused-checkpoint-30"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-300").write_text("a file")
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-20"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_a_kill_at_any_call_leaves_the_newest_whole(tmp_path, monkeypatch):
    """Every call that changes the file system is in turn the one before which, or after which, the process ends."""
    countdown = None

    def fatal(function, after):
        def call(*args, **kwargs):
            nonlocal countdown
            if countdown is not None:
                countdown -= 1
                if countdown == 0:
                    if after:
                        function(*args, **kwargs)
                    raise Killed
            return function(*args, **kwargs)

        return call

    moments, left = 0, set()
    for after in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "sync", fatal(checkpoints.sync, after))
            patch.setattr(checkpoints, "write_json", fatal(checkpoints.write_json, after))
            patch.setattr(Path, "rename", fatal(Path.rename, after))
            patch.setattr(shutil, "rmtree", fatal(shutil.rmtree, after))
            for moment in range(1, 100):
                output = tmp_path / f"{after}-{moment}"
                countdown = None
                write(output, 3, 6)
                folder = staged(output, 9)
                countdown = moment
                try:
                    publish(folder, RECORD)
                    rotate(output, 2)
                    break
                except Killed:
                    countdown = None
                moments += 1
                assert all(damage(checkpoint) is None for checkpoint in list_checkpoints(output))
                newest = newest_whole(output, RECORD)
                left.add(newest.name)
                assert newest.name in ("checkpoint-6", "checkpoint-9")
                clear_partial(output)  # the next process goes on
                if newest.name != "checkpoint-9":
                    write(output, 9)
                rotate(output, 2)
                assert sorted(path.name for path in output.iterdir()) == ["checkpoint-6", "checkpoint-9"]
    assert moments > 20
    assert left == {"checkpoint-6", "checkpoint-9"}
