"""Bundles behind HTTP: replicas on Ray Serve, which it starts, restarts and spreads, and one web server in this process.

Serve's own proxies stay off: they listen per cluster and not per command, know no limits, tokens or hosts, and a second command
could not have a port of its own. So what a client sends is looked at here before any of it reaches Ray, the token never leaves
this process, and all ends with it. See docs/design/009-serving.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from frostline.connection import cluster

import ray  # isort: skip (as `tune` has set it up)
import uvicorn  # isort: skip
from ray import serve  # isort: skip
from ray.exceptions import RayActorError, RayTaskError  # isort: skip
from ray.serve.config import ProxyLocation  # isort: skip
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException  # isort: skip
from ray.serve.schema import LoggingConfig  # isort: skip

from frostline.batches import Batches
from frostline.bundle import Bundle, bundle_of, files_of, load_bundle
from frostline.features import EVAL_BATCH
from frostline.intake import IMAGE, PAIR, TEXT, Input, Limits, Refused
from frostline.samples import BadSample
from frostline.text import plain
from frostline.trunks import trunk_id, trunk_of
from frostline.web import LOOPBACK, Asked, Door, Served, app_of
from frostline.worker import bring_from
from frostline.world import gpus_of_a_trial

ATTEMPTS = 3
"""At a request whose replica dies under it: another one answers, or the same when it is back."""
CALLS = 2
"""Of each replica at a time: a batch that passes, and one that is sent and decoded meanwhile."""
DECODERS = 4
"""Threads of a replica, each of which may hold one sample: an image of as many pixels as its bundle allows."""
TOKEN_VARIABLE = "FROSTLINE_SERVE_TOKEN"
TOKEN_LENGTH = 16
CONTROLLER = ("SERVE_CONTROLLER_ACTOR", "serve")
"""Ray Serve's actor and namespace, there while it runs on a cluster."""


Wanted = tuple[bytes, tuple[str, ...]]
"""The raw content of a sample (an encoded image, `raw_of` texts), and the bundles that are asked of it."""


class ServeError(ValueError):
    """Bundles that cannot be served as was asked."""


class Replica:
    """An actor: bundles on one trunk, loaded once, and batches of samples that are decoded and pass through it."""

    def __init__(self, opened: Callable[[], dict[str, Bundle]]) -> None:
        """`opened` gives the bundles by name."""
        bundles = opened()
        self.trunk = trunk_of(bundles)
        self.decoders = ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1), "frostline-decode")
        self.passes = ThreadPoolExecutor(1, "frostline-pass")
        self.recipe = self.trunk.bundle.recipe
        blank = np.zeros((1, *self.recipe.shape), self.recipe.dtype)
        self.trunk.logits(blank, tuple(bundles))  # the first pass takes longer

    async def predict(self, samples: Sequence[bytes], names: Sequence[str]) -> Asked:
        """What these bundles say of samples' raw contents: why some cannot be used, and the logits of the others."""
        loop = asyncio.get_running_loop()
        rows = await asyncio.gather(*(loop.run_in_executor(self.decoders, self._row, raw) for raw in samples))
        bad = {number: str(each) for number, each in enumerate(rows) if isinstance(each, BadSample)}
        good = [each for each in rows if not isinstance(each, BadSample)]
        if not good:
            return bad, {}
        return bad, await loop.run_in_executor(self.passes, self.trunk.logits, np.stack(good), names)

    async def ready(self) -> bool:
        """Whether it answers."""
        return True

    def _row(self, raw: bytes) -> np.ndarray | BadSample:
        try:
            return self.recipe.make(raw)
        except BadSample as error:
            return error


def serve_bundles(
    bundles: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: int = 1,
    max_batch: int = EVAL_BATCH,
    address: str | None = None,
    allow_open_cluster: bool = False,
    token: str | None = None,
    allow_open: bool = False,
    allow_hosts: Sequence[str] = (),
    tls: tuple[str, str] | None = None,
    limits: Limits | None = None,
    console: Console | None = None,
) -> None:
    """Serve bundles, `[NAME=]PATH` each, until a signal ends it, on a local Ray that is started and stopped here, or with their
    replicas on the cluster at `address`.

    Port 0 is any free one; with `tls`, the files of a certificate and of its key, it speaks HTTPS. Raises a ValueError where something
    cannot be honoured: before Ray is started, but for replicas that it has no room for.
    """
    for name, value in (("replicas", replicas), ("max-batch", max_batch)):
        if value < 1:
            raise ServeError(f"--{name} {value}: give 1 or more")
    local = is_loopback(host)
    if not (local or token or allow_open):
        raise ServeError(
            f"--host {host} is reachable from elsewhere, and there is no token: set {TOKEN_VARIABLE} or give --token-file, or "
            "say --allow-open to let anyone ask"
        )
    certificate, key = tls or (None, None)
    if tls:
        check_tls(*tls)
    limits, console = limits or Limits(), console or Console(stderr=True, highlight=False)
    door = Door(token, (*LOOPBACK, host, *allow_hosts) if local else None, tuple(allow_hosts))
    with contextlib.closing(listen(host, port)) as listener:
        folders = named(bundles)
        loaded = {name: load_bundle(path, device="cpu") for name, path in folders.items()}
        groups = grouped(loaded)
        with cluster(address, allow_open=allow_open_cluster) as wait:
            wait()
            with _serving(groups, loaded, folders, replicas, max_batch, stays=address is not None) as asks:
                served = {
                    name: Served(bundle.classes, given_to(bundle), bundle.task) for name, bundle in loaded.items()
                }
                app = app_of(served, partial(ask_all, asks), partial(all_ready, asks), door=door, limits=limits)
                scheme, name = "https" if tls else "http", f"[{host}]" if ":" in host else host
                url = f"{scheme}://{name}:{listener.getsockname()[1]}"
                for line in opening(url, groups, replicas, door):
                    console.print(plain(line), soft_wrap=True)
                config = uvicorn.Config(
                    app,
                    loop="asyncio",
                    http="h11",  # it limits the size of headers
                    ws="none",
                    lifespan="off",
                    log_level="warning",
                    access_log=False,
                    proxy_headers=False,
                    server_header=False,
                    limit_concurrency=4 * limits.requests,  # connections
                    timeout_graceful_shutdown=5,
                    ssl_certfile=certificate,
                    ssl_keyfile=key,
                )
                asyncio.run(uvicorn.Server(config).serve([listener]))


def opening(url: str, groups: Sequence[Sequence[str]], replicas: int, door: Door) -> Iterator[str]:
    """What is served, for people."""
    for names in groups:
        shared = f" (one backbone for {len(names)} bundles)" * (len(names) > 1)
        yield f"{', '.join(f'{url}/{name}/predict' for name in names)}: {replicas} replica{'s' * (replicas > 1)}{shared}"
    token = "with a token" if door.token else "without a token"
    if door.token and door.hosts is None and not url.startswith("https:"):
        token += ", which travels in the clear (--tls-cert)"
    yield f"{url}/ for people, {url}/openapi.json for programs; {token}; Ctrl-C ends it"


def named(bundles: Sequence[str]) -> dict[str, Path]:
    """Name -> folder of each `[NAME=]PATH`: by default the folder's, or the study's where it is called `bundle`. Raises
    ServeError."""
    found: dict[str, Path] = {}
    for each in bundles:
        name, given, path = each.partition("=")
        if not given or Path(each).exists():
            path = each
            folder = Path(path).absolute()
            name = folder.parent.name if folder.name == "bundle" else folder.name
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name):
            raise ServeError(
                f"{name!r} cannot be part of a path: name the bundle, of letters, digits, . _ and -: NAME={path}"
            )
        if name in found:
            raise ServeError(
                f"{found[name]} and {path} are both called {name}: give one of them another name, NAME={path}"
            )
        found[name] = Path(path)
    return found


def given_to(bundle: Bundle) -> Input:
    """What a client sends it."""
    return IMAGE if bundle.tokenizer is None else PAIR if bundle.pair else TEXT


def grouped(bundles: Mapping[str, Bundle]) -> list[list[str]]:
    """The names of bundles, those together that share a trunk."""
    groups: dict[str, list[str]] = {}
    for name, bundle in bundles.items():
        groups.setdefault(trunk_id(bundle), []).append(name)
    return list(groups.values())


def read_token(path: str | None) -> str | None:
    """What clients must know, if anything: in a file that only its owner may read, else in $FROSTLINE_SERVE_TOKEN, which is taken
    out of the environment, as that goes to Ray's processes. Raises ServeError, which never has the token in it."""
    variable = os.environ.pop(TOKEN_VARIABLE, None)
    if path is None and variable is None:
        return None
    where, token = TOKEN_VARIABLE, variable or ""
    if path is not None:
        where = f"--token-file {path}"
        try:
            if Path(path).stat().st_mode & 0o077:
                raise ServeError(f"{where} can be read by others: chmod 600 {path}")
            token = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ServeError(f"{where} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    token = token.strip()
    if not re.fullmatch(f"[!-~]{{{TOKEN_LENGTH},1000}}", token):
        raise ServeError(
            f"the token of {where} is not {TOKEN_LENGTH} or more letters, digits and signs without spaces; make one with: "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return token


def check_tls(certificate: str, key: str) -> None:
    """Raises ServeError unless these files are a certificate and its key, which is not for everyone to read."""

    def locked() -> str:
        raise ServeError(f"--tls-key {key} is locked by a passphrase: openssl pkey -in {key} -out UNLOCKED")

    try:
        if Path(key).stat().st_mode & 0o007:
            raise ServeError(f"--tls-key {key} can be read by everyone: chmod o= {key}")
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, locked)
    except OSError as error:  # as ssl's own errors are
        why = error.strerror or error
        raise ServeError(
            f"--tls-cert {certificate} --tls-key {key}: {why}; they must be a certificate and its key as PEM"
        ) from None


def is_loopback(host: str) -> bool:
    """Whether what listens there is reached from this machine only."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ip_address(host).is_loopback
    return False


def listen(host: str, port: int) -> socket.socket:
    """A socket of our own there. Raises ServeError."""
    if not 0 <= port <= 65535:
        raise ServeError(f"--port {port}: there are 1 to 65535, and 0 for any that is free")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ServeError(f"--host {host} --port {port}: no such place ({error})") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        why = error.strerror or error
        raise ServeError(f"--host {host} --port {port} cannot be listened at: {why}; give another --port") from None
    return listener


@contextlib.contextmanager
def _serving(
    groups: Sequence[Sequence[str]],
    bundles: Mapping[str, Bundle],
    folders: Mapping[str, Path],
    replicas: int,
    most: int,
    *,
    stays: bool,
) -> Iterator[list[Asks]]:
    """Replicas that are ready, as an application of Ray Serve a trunk. They end with the block, and Serve too unless it was there
    before; where the cluster does not stay, all end with that. Raises ServeError."""
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    there, here = _is_running(), ray.get_runtime_context().get_node_id()
    needs = {tuple(names): _needs(bundles[names[0]], replicas) for names in groups}
    _check_room(needs)
    serve.start(proxy_location=ProxyLocation.Disabled, logging_config=LoggingConfig(log_level="ERROR"))
    started: list[str] = []
    try:
        asks: list[Asks] = []
        for names, need in needs.items():
            files = {name: ray.put(files_of(folders[name])) for name in names}
            have = partial(bring_from, here, [each for name in names for each in bundles[name].parcels])
            deployment: Any = serve.deployment(
                name="replica",
                num_replicas=replicas,
                ray_actor_options={"num_cpus": need["CPU"] / replicas, "num_gpus": need["GPU"] / replicas},
                max_ongoing_requests=4 * CALLS,
                max_constructor_retry_count=2,
                health_check_period_s=2,
                health_check_timeout_s=60,
                graceful_shutdown_wait_loop_s=0.5,
                graceful_shutdown_timeout_s=5,
                logging_config=LoggingConfig(log_level="ERROR", enable_access_log=False),
            )(Replica)
            started.append(f"frostline-{os.getpid()}-{'-'.join(names)}"[:200])
            handle = serve.run(deployment.bind(partial(_received, files, have)), name=started[-1], route_prefix=None)
            asks.append(Asks.of(names, handle, replicas, most))
        yield asks
    except RuntimeError as error:
        if "serve" not in type(error).__module__ and "Deploying app" not in str(error):
            raise
        raise ServeError(f"Ray Serve could not start the replicas: {str(error).strip().splitlines()[-1]}") from error
    finally:
        if stays and there:
            for name in started:
                with contextlib.suppress(RayServeException):
                    serve.delete(name)
        elif stays:
            serve.shutdown()


def _is_running() -> bool:
    try:
        ray.get_actor(*CONTROLLER)
    except ValueError:
        return False
    return True


def _needs(bundle: Bundle, replicas: int) -> dict[str, float]:
    """CPUs and GPUs of a trunk's replicas: each takes what a trial's passes took."""
    resources = bundle.spec.resources
    gpus = gpus_of_a_trial(resources, ray.cluster_resources().get("GPU", 0))
    return {"CPU": float(resources.threads * replicas), "GPU": gpus * replicas}


def _check_room(needs: Mapping[tuple[str, ...], Mapping[str, float]]) -> None:
    """Raises ServeError where replicas would wait for ever."""
    there = ray.cluster_resources()
    for kind in ("CPU", "GPU"):
        needed = sum(need[kind] for need in needs.values())
        if needed > there.get(kind, 0):
            raise ServeError(
                f"the replicas take {needed:g} {kind}s (each as many as its trial: resources.threads, resources.gpus), and there are "
                f"{there.get(kind, 0):g}; give fewer --replicas or bundles, or the --address of a larger cluster"
            )


def _received(files: Mapping[str, Any], have: Callable[[], None]) -> dict[str, Bundle]:
    """Bundles of references to their files; `have` has here what else they are loaded from."""
    have()
    return {name: bundle_of(ray.get(held)) for name, held in files.items()}


@dataclass(frozen=True)
class Asks:
    """A trunk's replicas, as the web server asks them: what came for any of its bundles goes to them in batches."""

    names: tuple[str, ...]
    handle: Any
    batches: Batches[Wanted, str | dict[str, np.ndarray]]

    @classmethod
    def of(cls, names: Sequence[str], handle: Any, replicas: int, most: int) -> Asks:
        """Each replica has a batch under way and one at hand."""
        return cls(tuple(names), handle, Batches(partial(_ask, handle), most, CALLS * replicas))


async def ask_all(asks: Sequence[Asks], samples: Sequence[bytes], names: Sequence[str]) -> Asked:
    """What bundles say of samples; each trunk is asked once for all of its bundles among them. Raises Refused."""
    wanted = [(each, tuple(name for name in each.names if name in names)) for each in asks]
    told = await asyncio.gather(*(each.batches([(raw, some) for raw in samples]) for each, some in wanted if some))
    bad = {number: said for each in told for number, said in enumerate(each) if isinstance(said, str)}
    if bad:
        return bad, {}
    rows = [dict(chain.from_iterable(each.items() for each in sample)) for sample in zip(*told, strict=True)]
    return {}, {name: np.stack([each[name] for each in rows]) for name in names}


async def _ask(handle: Any, items: Sequence[Wanted]) -> list[str | dict[str, np.ndarray]]:
    """Of each sample why it cannot be used, or name of a bundle -> (C,) logits. Raises Refused."""
    names = sorted({name for _, wanted in items for name in wanted})
    for _ in range(ATTEMPTS):
        try:
            bad, logits = await handle.predict.remote([raw for raw, _ in items], names)
        except RayTaskError:
            raise
        except (RayActorError, DeploymentUnavailableError, BackPressureError):
            continue
        rows = iter(range(len(items)))
        row_of = {number: next(rows) for number in range(len(items)) if number not in bad}
        return [
            {name: logits[name][row_of[number]] for name in wanted} if number in row_of else bad[number]
            for number, (_, wanted) in enumerate(items)
        ]
    why = f"{ATTEMPTS} have ended while they answered"
    raise Refused(503, "no replica", why, "ask again in some seconds", {"Retry-After": "10"})


async def all_ready(asks: Sequence[Asks]) -> bool:
    """Whether a replica of every trunk answers within some seconds."""
    try:
        async with asyncio.timeout(5):
            return all(await asyncio.gather(*(each.handle.ready.remote() for each in asks)))
    except (TimeoutError, RayActorError, DeploymentUnavailableError, BackPressureError):
        return False
