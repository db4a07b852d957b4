"""A Ray cluster to run on, one that is there or one of our own, which is connected to while this process does something else."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from frostline.machine import listens_publicly
from frostline.rayenv import TOKEN_HINT, ClusterError, keep_token, private_folder, settings

os.environ.update(settings())
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # verbose=0 is silent in the old one only

import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray.exceptions import AuthenticationError

OPEN = "lets in whoever reaches it, and they run code on it"
UNASKED = (
    "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1]).internal_kv_keys(b'', None, 10)"
)
"""A call to a cluster's head, which fails where a token is wanted."""
QUIET_LOGGERS = (
    "ray.tune",  # warns of result files that it was told not to write
    "ray._private.authentication.authentication_token_setup",  # says at each start that token authentication is on
)


@contextmanager
def cluster(address: str | None, *, allow_open: bool = False) -> Iterator[Callable[[], bool]]:
    """Connected to Ray, in a thread of its own, as that takes seconds: call what is yielded to wait for it, and to hear whether
    the cluster is open to whoever reaches it. It raises ClusterError where that is so and not allowed."""
    on_terminate = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1, "frostline-ray") as pool:
        connecting = pool.submit(_connect, address, allow_open)

        def wait() -> bool:
            is_open = connecting.result()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_terminate)  # Ray's own handler aborts the process
            return is_open

        try:
            yield wait
        finally:
            futures.wait([connecting])
            ray.shutdown()


def _connect(address: str | None, allow_open: bool) -> bool:
    """To a cluster that is there, which is sent this very code, or to one of our own, which only this user of this machine
    reaches. Answers whether it is open. Raises ClusterError."""
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address is None:
        keep_token()
        folder = str(private_folder())
        with _on_loopback():
            ray.init("local", include_dashboard=False, _temp_dir=folder, **options)
        return False
    try:
        ray.init(address, runtime_env=_own_code(), **options)
    except (ConnectionError, AuthenticationError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address!r}: {str(error).splitlines()[0]}. {TOKEN_HINT}"
        ) from error
    is_open = lets_anyone_in(ray.get_runtime_context().gcs_address)
    if is_open and not allow_open:
        raise ClusterError(
            f"the cluster at {address} {OPEN}: start it with RAY_AUTH_MODE=token (cluster/README.md), or say "
            "--allow-open-cluster where nobody else does reach it"
        )
    if is_open:
        logging.getLogger(__name__).warning("warning: the cluster at %s %s", address, OPEN)
    return is_open


@contextmanager
def _on_loopback() -> Iterator[None]:
    """What is started inside listens on loopback only, as Ray has it on macOS and Windows; elsewhere it would on all interfaces."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def lets_anyone_in(gcs_address: str) -> bool:
    """Whether the head there, to which this process is connected, answers without a token, and not to its own machine alone."""
    host, _, port = gcs_address.rpartition(":")
    if host in ("127.0.0.1", "[::1]", "localhost") and not listens_publicly(int(port)):
        return False
    if not is_token_auth_enabled():
        return True
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", UNASKED, gcs_address]
    return subprocess.run(command, env=env | {"RAY_AUTH_MODE": "disabled"}, capture_output=True).returncode == 0


def _own_code() -> dict[str, Any]:
    """What sends this package to the workers; nothing in a job of the Jobs API that has brought it, which Ray sends on."""
    brought = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    return {} if brought.get("py_modules") else {"py_modules": [str(Path(__file__).parent)]}
