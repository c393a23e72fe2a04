"""The bench runs every stage at a small size and ends with a line of JSON."""
import json

import bench


def test_every_stage(capsys):
    bench.main("encode decode forward prfl --size 32x32 --frames 5 --vae_dim 4 --k 1 --repeats 1".split())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["size"] == [32, 32] and result["frames"] == 5
    for stage in ("encode", "decode", "forward", "prfl step, k = 1, without the optimizer"):
        assert result[stage]["seconds"] > 0 and result[stage]["gigabytes"] > 0
