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


def test_memory_is_the_passes_own_whatever_this_process_held():
    sizes = {"num_embeddings": 4096, "embedding_dim": 64, "seed_dim": 64, "num_heads": 2, "rank": 32}
    held = bytearray(400 * 2**20)
    held[::4096] = b"1" * len(held[::4096])
    fast, oracle = (speed.peak_mebibytes(path, sizes, 2048) for path in speed.PATHS)
    assert len(held)
    # phi of the oracle: 2 heads x 2048 tokens x 64 x 32 numbers of 4 bytes, several times
    assert 32 < oracle < 400
    assert fast < oracle / 2
