"""What the README shows runs as it stands."""

from __future__ import annotations

import contextlib
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore_client import Client, FetchOutcome, Layout, PutOutcome
from tests.support.processes import agent, daemon
from tests.support.tree import ROOT


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.slow
def test_the_example_stores_what_it_missed_and_finds_it_again() -> None:
    with daemon("--listen", "tcp://127.0.0.1:0", "--memory", "256MiB") as running:
        program = examples()[0].replace("tcp://127.0.0.1:7450", running.uri)
        for expected in ("PutOutcome.STORED", "FetchOutcome.HIT"):
            result = subprocess.run(
                [sys.executable, "-c", program],
                cwd=ROOT,
                env={
                    "PYTHONPATH": f"{ROOT}:{ROOT / 'client'}",
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert result.returncode == 0, result.stderr
            assert result.stdout.count(expected) == 32, result.stdout


@pytest.mark.slow
def test_memory_of_the_client_is_written_by_the_daemon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = Layout(model_id="m", dtype="bfloat16", block_tokens=16, layer_bytes=(4096,))
    keys = [hashlib.sha256(b"block %d" % number).digest() for number in range(8)]
    listen = ("--listen", f"unix://{tmp_path}/kv.sock")
    with (
        daemon(*listen, "--memory", "16MiB") as running,
        Client(running.uri) as client,
    ):
        namespace = client.open_namespace("pool", layout)
        assert client.put(namespace, keys, bytearray(8 * 4096)).result().ok
        known = {"client": client, "namespace": namespace, "keys": keys, "layout": layout}
        exec(examples()[1], known)
    assert capsys.readouterr().out == "shm\n"


@pytest.mark.slow
def test_a_whole_turn_goes_as_it_is_shown(tmp_path: Path) -> None:
    # One layer, so that the one that is offered is all of them.
    layout = Layout(model_id="m", dtype="bfloat16", block_tokens=16, layer_bytes=(65536,))
    keys = [hashlib.sha256(b"block %d" % number).digest() for number in range(8)]
    hits = 5
    content = bytes(range(256)) * 256
    blocks = [bytearray(content) for _ in keys]
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        storage = enter(daemon("--memory", "16MiB")).uri
        node = [f"--local=unix://{tmp_path}/{name}.sock" for name in ("decode", "prefill")]
        common = ["--storage", storage, "--memory", "16MiB"]
        one = enter(agent(*common, node[0], "--node-id=decode-1", listeners=2))
        other = enter(
            agent(*common, node[1], f"--relay={one.uris[0]}", "--node-id=prefill-1", listeners=2)
        )
        prefill = enter(Client(other.uris[1], node_id="prefill-engine"))
        decode = enter(Client(one.uris[1], node_id="decode-engine"))
        namespace = prefill.open_namespace("pool", layout)
        decode.open_namespace("pool", layout)
        stored = prefill.put(namespace, keys[:hits], blocks[:hits])
        assert stored.result().outcomes == [PutOutcome.STORED] * hits
        known = {
            "prefill": prefill,
            "decode": decode,
            "namespace": namespace,
            "keys": keys,
            "hits": hits,
            "n": 0,
            "memory": [bytearray(65536) for _ in keys],
            "computed_layer": blocks[hits:],
            "computed": blocks[hits:],
        }
        program = examples()[2].replace("tcp://10.2.0.1:7460", other.uris[0])
        program = program.replace("memory, decode_node", "memory[:hits], decode_node")
        lines = [line for line in program.splitlines() if line and not line.startswith("#")]
        results = []
        for line in lines:
            made = eval(line, known)
            if hasattr(made, "result"):
                made.wait_quiet(30.0)
                results.append(made.result())
        loaded, offered, pulled, put = results
        assert loaded.outcomes == [FetchOutcome.HIT] * hits
        assert offered.ok
        assert pulled.outcomes == [FetchOutcome.HIT] * len(keys), pulled.errors
        assert put.ok
        assert all(block == content for block in known["memory"])
