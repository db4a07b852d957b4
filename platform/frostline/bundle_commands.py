"""What the commands predict, export and serve do."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from frostline.text import plain


def predict(arguments: argparse.Namespace) -> int:
    """`frostline predict`."""
    from frostline.predict import lines, predict_data

    if arguments.batch is not None and arguments.batch < 1:
        raise ValueError(f"--batch {arguments.batch}: give 1 or more samples a pass")
    summary = predict_data(
        arguments.bundle,
        arguments.data,
        arguments.out,
        arguments.overrides,
        split=arguments.split,
        features=arguments.features,
        batch=arguments.batch,
        address=arguments.address,
        allow_open_cluster=arguments.allow_open_cluster,
    )
    console = Console(highlight=False)
    for line in lines(summary):
        console.print(plain(line), soft_wrap=True)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """`frostline export`."""
    from frostline.export import export_bundle

    done = export_bundle(
        arguments.bundle, "full" if arguments.full else arguments.to, Path(arguments.out) if arguments.out else None
    )
    console = Console(highlight=False)
    for line in (f"{done.path}: {done.wrote}", f"open it with: {done.opened}"):
        console.print(plain(line), soft_wrap=True)
    return 0


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `frostline serve`."""
    parser.add_argument(
        "bundles",
        nargs="+",
        metavar="[NAME=]BUNDLE",
        help="a bundle's folder; it is asked at /NAME/predict (default: the folder's name, the study's for STUDY/bundle)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="(default: 8000; 0 is any free one)")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="of each backbone (default: 1)")
    parser.add_argument("--max-batch", type=int, default=64, metavar="N", help="samples a pass at most (default: 64)")
    parser.add_argument(
        "--address", help="a running Ray cluster for the replicas, 'auto' on one of its nodes; else a local Ray"
    )
    parser.add_argument(
        "--token-file",
        metavar="PATH",
        help="a file with what clients must know, readable by its owner only; else $FROSTLINE_SERVE_TOKEN where that is set",
    )
    parser.add_argument("--allow-open", action="store_true", help="let anyone ask who reaches a public --host")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which a proxy before this server is known; may be given several times",
    )
    parser.add_argument("--tls-cert", metavar="PATH", help="a certificate as PEM, with those that vouch for it: HTTPS")
    parser.add_argument("--tls-key", metavar="PATH", help="its key as PEM, not readable by everyone")
    parser.set_defaults(interrupted="frostline: no longer serving")


def serve(arguments: argparse.Namespace) -> int:
    """`frostline serve`."""
    from frostline.extras import extra

    for package in ("fastapi", "uvicorn", "python_multipart"):
        extra("serve", package)
    from frostline.serve import read_token, serve_bundles

    tls = (arguments.tls_cert, arguments.tls_key)
    if (tls[0] is None) != (tls[1] is None):
        raise ValueError("--tls-cert and --tls-key go together: give both, or neither")
    serve_bundles(
        arguments.bundles,
        host=arguments.host,
        port=arguments.port,
        replicas=arguments.replicas,
        max_batch=arguments.max_batch,
        address=arguments.address,
        allow_open_cluster=arguments.allow_open_cluster,
        token=read_token(arguments.token_file),
        allow_open=arguments.allow_open,
        allow_hosts=arguments.allow_host,
        tls=tls if all(tls) else None,
    )
    return 0
