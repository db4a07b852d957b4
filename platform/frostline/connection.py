"""A Ray cluster to run on, one that is there or one of our own, which is connected to while this process does something else."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from frostline.rayenv import TOKEN_HINT, ClusterError, settings

os.environ.update(settings())
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # verbose=0 is silent in the old one only

import ray
from ray.exceptions import AuthenticationError

QUIET_LOGGERS = (
    "ray.tune",  # warns of result files that it was told not to write
    "ray._private.authentication.authentication_token_setup",  # says at each start that token authentication is on
)


@contextmanager
def cluster(address: str | None) -> Iterator[Callable[[], None]]:
    """Connected to Ray, in a thread of its own, as that takes seconds: call what is yielded to wait for it."""
    on_terminate = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1, "frostline-ray") as pool:
        connecting = pool.submit(_connect, address)

        def wait() -> None:
            connecting.result()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_terminate)  # Ray's own handler aborts the process

        try:
            yield wait
        finally:
            futures.wait([connecting])
            ray.shutdown()


def _connect(address: str | None) -> None:
    """To a cluster that is there, which is sent this very code, or to one of our own. Raises ClusterError."""
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if address is None:
        ray.init("local", include_dashboard=False, **options)
    else:
        try:
            ray.init(address, runtime_env=_own_code(), **options)
        except (ConnectionError, AuthenticationError) as error:
            raise ClusterError(
                f"no Ray cluster answers at {address!r}: {str(error).splitlines()[0]}. {TOKEN_HINT}"
            ) from error


def _own_code() -> dict[str, Any]:
    """What sends this package to the workers; nothing in a job of the Jobs API that has brought it, which Ray sends on."""
    brought = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    return {} if brought.get("py_modules") else {"py_modules": [str(Path(__file__).parent)]}
