"""Requests answered in batches, against the same requests one by one: `frostline serve` with --max-batch 64 and with 1.

Both are started as users start them, each with one replica of one thread, and meet the same load from a process of its own:
32 connections, each with one image a request, the next as soon as the answer is there. The bundle is a linear head on
EfficientNet-Lite0 at 64 px, the images are digits as PNG files. The ratio is batched over one by one, in requests a second;
`latency_ms` has the median and the 99th percentile of each under that load, `alone_ms` those of one connection that nobody
shares the server with. On a CPU a batch saves what each layer's call costs, and not the arithmetic: the larger the images,
the smaller the ratio; at 224 px expect little. Web server, load and replica share the cores.

    python benchmarks/serving.py [--rounds 5] [--size 64] [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import frostline
from _measure import interleaved, ratios, say
from frostline.jobfile import parse_job
from frostline.testing import TOY_BACKBONE

CONNECTIONS = 32
TOLERANCE = 1e-5  # between probabilities: sums in another order


def trained(root: Path, size: int, quick: bool) -> Path:
    """A linear head's bundle."""
    job = parse_job(
        {
            "name": "serving",
            "results": str(root / "study"),
            "data": {"path": "digits", "image_size": size, "per_class": 16},
            "backbone": {"name": TOY_BACKBONE, "weights": "random"} if quick else {"name": "efficientnet-lite0"},
            "train": {"epochs": 2},
            "search": {"trials": 1},
            "confirm": {"seeds": 1},
            "arms": {"probe": {"strategy": "linear_probe", "space": {"train.head_lr": 1e-2}}},
        },
        [],
    )
    return frostline.search(job, inline=True) / "bundle"


@contextlib.contextmanager
def server(bundle: Path, folder: Path, most: int) -> Iterator[int]:
    """The port of one that is ready."""
    log = folder / f"serve-{most}.log"
    command = [
        sys.executable,
        "-m",
        "frostline.cli",
        "serve",
        f"digits={bundle}",
        "--port",
        "0",
        "--max-batch",
        str(most),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        while not (found := re.search(r"http://127.0.0.1:(\d+)/ for people", log.read_text())):
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.2)
        yield int(found[1])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def load(port: int, requests: int, connections: int) -> dict[str, Any]:
    """From a process of its own: seconds, latencies in ms, and the probabilities that each request got."""
    command = [sys.executable, __file__, "--load", str(port), str(requests), str(connections)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


async def loading(port: int, requests: int, connections: int) -> dict[str, Any]:
    """The same in this process."""
    images = []
    for pixels in load_digits().images:
        file = io.BytesIO()
        Image.fromarray((pixels * 15.9).astype(np.uint8)).save(file, "PNG")
        images.append(file.getvalue())
    todo = iter(range(requests))
    latency_ms, told = [0.0] * requests, [[]] * requests

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in todo:
            image = images[number % len(images)]
            head = f"POST /digits/predict?top_k=10 HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: {len(image)}\r\n\r\n"
            started = time.perf_counter()
            writer.write(head.encode() + image)
            answered = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", answered)
            assert answered.startswith(b"HTTP/1.1 200"), answered
            assert length
            body = await reader.readexactly(int(length[1]))
            latency_ms[number] = 1e3 * (time.perf_counter() - started)
            (each,) = json.loads(body)["predictions"]
            told[number] = [each["probability"] for each in sorted(each["top"], key=lambda one: one["label"])]
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(connection() for _ in range(connections)))
    return {"seconds": time.perf_counter() - started, "latency_ms": latency_ms, "told": told}


def percentiles(latency_ms: list[float]) -> dict[str, float]:
    """The median and the 99th percentile."""
    return {f"p{share}": float(np.percentile(latency_ms, share)) for share in (50, 99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=64, help="side of the network's input in pixels")
    parser.add_argument("--quick", action="store_true", help="a toy network at 16 px, one round")
    parser.add_argument(
        "--load", type=int, nargs=3, metavar=("PORT", "REQUESTS", "CONNECTIONS"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(asyncio.run(loading(*arguments.load))))
        return
    rounds, requests = (1, 200) if arguments.quick else (arguments.rounds, 1500)
    size = 16 if arguments.quick else arguments.size
    found: dict[str, list[dict[str, Any]]] = {"batched": [], "one by one": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        bundle = trained(root, size, arguments.quick)
        with server(bundle, root, 64) as batched, server(bundle, root, 1) as single:
            ports = {"batched": batched, "one by one": single}
            for port in ports.values():
                load(port, 100, CONNECTIONS)

            def loaded(name: str) -> float:
                found[name].append(load(ports[name], requests, CONNECTIONS))
                return found[name][-1]["seconds"]

            seconds = interleaved({name: partial(loaded, name) for name in ports}, rounds)
            alone = load(batched, 100, 1)
    told = {name: np.array(each[-1]["told"]) for name, each in found.items()}
    difference = float(np.abs(told["batched"] - told["one by one"]).max())
    say(
        "serving",
        {
            **ratios(seconds["batched"], seconds["one by one"]),
            "rounds": rounds,
            "counts": {"requests": requests, "connections": CONNECTIONS},
            "equal_scores": difference <= TOLERANCE,
            "largest_difference": difference,
            "size": size,
            "requests_per_s": {name: requests / statistics.median(each) for name, each in seconds.items()},
            "latency_ms": {
                name: percentiles([one for run in each for one in run["latency_ms"]]) for name, each in found.items()
            },
            "alone_ms": percentiles(alone["latency_ms"]),
        },
    )


if __name__ == "__main__":
    main()
