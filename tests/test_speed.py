import json

import pytest

from eval import speed


def test_it_runs_and_writes_what_it_says(tmp_path, capsys):
    out = tmp_path / "speed.json"
    speed.main(["--out", str(out), "--short", "--repeats", "1", "--tokens", "64"])
    found = json.loads(out.read_text())["embedding"]
    assert {"forward_ratio", "forward_backward_ratio", "memory_ratio"} <= found.keys()
    assert found["forward_seconds"]["generate"]["median"] > 0
    assert "ratio" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        speed.main(["--out", str(out), "--short", "--tokens", "257"])
