"""The worker processes of a simulation: where they run, what they hold, and who replaces the dead.

A worker is a place, not a process: a process that dies is replaced by another, and where there is
no room for one, as its node has left, its place is taken by a process that lives. What is dealt to
a place, and so every result, stays the same.
"""

import ctypes
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, Self

import ray
from flwr.clientapp import ClientApp
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)

from fedinit.errors import RequestError, one_line
from fedinit.simulation.worker import Assignment, Worker

# glibc hands every freed activation back to the kernel and faults it in again; keep it instead, and
# let the kernel give large vectors large pages.
ENVIRONMENT = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
}
# Of a driver likewise, by glibc's numbers of the options: half a GiB that is free at the most, and
# nothing above 256 MiB, which is data more often than a vector.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_DRIVER = {_M_TRIM_THRESHOLD: 512 << 20, _M_TOP_PAD: 64 << 20, _M_MMAP_THRESHOLD: 256 << 20}
# Weights up to this size go along with each call, where Ray is started for it: for an object in
# Ray's store several processes have to talk to each other, which takes longer than a few copies.
_INLINE_BYTES = 1 << 20
# What Ray sends along with a call or its result: a worker's sums are some vectors like x.
_RAY = {"RAY_max_direct_call_object_size": str(4 * _INLINE_BYTES)}
# Processes of Ray that watch for a cluster that grows, for logs to show and for visitors of a page.
# Nobody here asks for any of it, and of two cores they take 2%, at the start-up a second.
_UNUSED = ("MONITOR", "LOG_MONITOR", "DASHBOARD")
# The process, its node, or what it had made.
DIED = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)
_ROOM_SECONDS = 20  # that a new process has to be there before one that lives takes its place
_ANSWER_SECONDS = 10  # that a cluster's address has to answer
_PATIENCE = 300  # seconds that a process may take to start where there is no other


class Workers:
    """The worker processes of a simulation, kept from run to run.

    Args:
        number: how many; None for one on each GPU that Ray has, or else on each CPU, `most` at the
            most. More workers than GPUs have a half, a third ... of one each.
        most: an upper bound for `number=None`: more workers than clients in a round would idle.
        import_path: folders that workers put on their import path; sent to other machines.
        address: a running Ray cluster to join; None starts Ray on this machine, for this machine.

    Attributes:
        inline_bytes: an ArrayRecord up to this size goes along with a call, not by Ray's store.

    Raises:
        RequestError: Ray has fewer CPUs than `number`, or does not start or cannot be reached.
    """

    def __init__(
        self,
        number: int | None = None,
        most: int | None = None,
        import_path: Sequence[str] = (),
        address: str | None = None,
    ) -> None:
        _keep_freed_memory()
        self._started = not ray.is_initialized()
        if self._started:
            _start_ray(import_path, address)
        resources = ray.cluster_resources()
        cpus, gpus = (int(resources.get(kind, 0)) for kind in ("CPU", "GPU"))
        if number is not None and number > cpus:
            if self._started:
                ray.shutdown()
            raise RequestError(f"workers: {number} workers, but Ray has {cpus} CPUs")
        self.number = number or max(1, min(gpus or cpus, cpus, most or cpus))
        self.gpu_share = 1 / -(-self.number // gpus) if gpus else 0.0
        without = address is not None or not self._started  # Ray was started without ENVIRONMENT
        self.inline_bytes = 0 if without else _INLINE_BYTES
        self._actor = ray.remote(Worker).options(
            num_cpus=1,
            num_gpus=self.gpu_share,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": ENVIRONMENT} if without else None,
        )
        self._import_path = list(import_path) if address is None else []  # Ray ships the folder
        self._app: tuple[Callable[[], ClientApp], int] | None = None
        self._placed = False
        self._stored: dict[str, ray.ObjectRef] = {}
        self._measured: dict[str, Any] = {}
        self._actors: list[Any] = [self._new_actor() for _ in range(self.number)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        for actor in self._actors:
            ray.kill(actor)
        if self._started:
            ray.shutdown()

    def store(self, key: str, make: Callable[[], Any]) -> ray.ObjectRef:
        """Put what `make` returns into Ray's object store, once for each key."""
        if key not in self._stored:
            self._stored[key] = ray.put(make())
        return self._stored[key]

    def measure(self, key: str, function: Callable[[], Any]) -> Any:
        """Return what `function` returns in a worker; it is called once for each key.

        Raises:
            RuntimeError: Ray has no room for the workers, or two die of it; or whatever `function`
                raises.
        """
        if key not in self._measured:
            self._wait_for_room()
            try:
                found = _get(self._actors[0].call.remote(function))
            except DIED:
                self._app = None  # the last run's: it may be what the process died of
                self.replace(0)
                try:
                    found = _get(self._actors[0].call.remote(function))
                except DIED as error:
                    message = f"2 workers died while they measured: {why_died(error)}"
                    raise RuntimeError(message) from None
            self._measured[key] = found
        return self._measured[key]

    def load(self, make_app: Callable[[], ClientApp], num_clients: int) -> None:
        """Build a ClientApp in every worker, and in those that will replace one.

        Raises:
            RuntimeError: Ray has no room for the workers; or whatever `make_app` raises.
        """
        self._app = (make_app, num_clients)
        self._wait_for_room()
        loading = [actor.load.remote(*self._app) for actor in self._actors]
        for worker, ref in enumerate(loading):
            try:
                _get(ref)
            except DIED:
                self.replace(worker)

    def run(self, worker: int, assignment: Assignment) -> ray.ObjectRef:
        """Start a share on a worker."""
        return self._actors[worker].run.remote(assignment)

    def result(self, ref: ray.ObjectRef) -> Any:
        """Return what came of a share; what the worker raised is raised, or one of `DIED`."""
        return _get(ref)

    def replace(self, worker: int) -> None:
        """Put a new process in the place of one that died, or if there is no room one that lives.

        Raises:
            RuntimeError: no worker is left.
        """
        dead = self._actors[worker]
        if self._lives(dead):  # the process of another place died too, and has been replaced
            return
        new = self._new_actor()
        loading = self._loaded(new)
        try:
            _get(loading, _ROOM_SECONDS)
        except (GetTimeoutError, *DIED):
            living = next(filter(self._lives, self._actors), None)
            if living is None:  # it may be slow, and not without room
                self._expect(loading)
            elif not ray.wait([loading], timeout=0)[0] or not self._lives(new):
                ray.kill(new)
                new = living
        self._actors = [new if actor is dead else actor for actor in self._actors]

    def _wait_for_room(self) -> None:
        """Wait for the first processes: others may have taken a cluster's CPUs.

        Raises:
            RuntimeError: they are not there in time.
        """
        if not self._placed:
            starting = [actor.call.remote(int) for actor in self._actors]
            with suppress(ImportError):  # a second of the first server step, while they start
                import_module("torch._dynamo")
            _, missing = ray.wait(starting, num_returns=len(starting), timeout=_PATIENCE)
            if missing:
                raise RuntimeError(f"workers: Ray has no room for {self.number} workers now")
            self._placed = True

    @staticmethod
    def _expect(loading: ray.ObjectRef) -> None:
        try:
            _get(loading, _PATIENCE)
        except GetTimeoutError:
            message = "no worker is left, and Ray has no room for a new one"
            raise RuntimeError(message) from None
        except DIED as error:
            raise RuntimeError(f"no worker is left: {why_died(error)}") from None

    def _lives(self, actor: Any) -> bool:
        try:
            _get(self._loaded(actor))
        except DIED:
            return False
        return True

    def _loaded(self, actor: Any) -> ray.ObjectRef:
        """Build the present ClientApp in an actor."""
        make_app, num_clients = self._app or (ClientApp, 0)
        return actor.load.remote(make_app, num_clients)

    def _new_actor(self) -> Any:
        return self._actor.remote(self._import_path)


def why_died(error: Exception) -> str:
    """Return what Ray says first of a death; ids and addresses follow."""
    return one_line(str(error).partition("\n")[0])


def _get(ref: ray.ObjectRef, timeout: float | None = None) -> Any:
    """Return a task's result; what it raised is raised without Ray's account of it."""
    try:
        return ray.get(ref, timeout=timeout)
    except DIED:
        raise
    except RayTaskError as error:
        raise (error.cause or error) from None


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Let processes that are started meanwhile have these environment variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _keep_freed_memory() -> None:
    """Let the driver do as its workers do: x and D are made anew in each round."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for option, value in _DRIVER.items():
            mallopt(option, value)


def _check_address(address: str) -> None:
    """Check that somebody is there: Ray itself asks again and again, for many minutes.

    Raises:
        RequestError: nobody is.
    """
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host:
        return  # `auto`, or another of Ray's own ways to say it
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise RequestError(f"--address {address}: nobody answers: {one_line(error)}") from None


def _start_ray(import_path: Sequence[str], address: str | None) -> None:
    """Start Ray where nobody else reaches it, or join a cluster.

    Raises:
        RequestError: Ray says why not.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Else workers would give way to whatever runs, by 15 steps; a cluster's do as its owner says.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Waiting, Ray looks for signals once a second by itself: two Ctrl-C within it were one.
    os.environ.setdefault("RAY_get_check_signal_interval_milliseconds", "50")
    # Ray's own switch, off by itself on other systems than Linux: Ray then listens on loopback.
    ray_constants.ENABLE_RAY_CLUSTER = address is not None
    settings: dict[str, Any] = {"address": "local", "include_dashboard": False}
    if address is not None:
        _check_address(address)
        settings = {"address": address}
        if import_path:  # nobody says that the machines share a file system
            excluded = ["results", ".git", "*.safetensors", "*.parquet", "*.arrow", "*.jsonl"]
            settings["runtime_env"] = {"working_dir": import_path[0], "excludes": excluded}
    before = signal.getsignal(signal.SIGTERM)  # Ray takes it for itself, and keeps it
    try:
        with environment(ENVIRONMENT | _RAY if address is None else {}):
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **settings)
    except Exception as error:  # whatever it is that Ray could not do
        where = "Ray" if address is None else f"--address {address}: Ray"
        raise RequestError(f"{where} did not start: {one_line(error)}") from None
    except SystemExit:  # Ray's answer to SIGTERM
        if callable(before):
            before(signal.SIGTERM, None)
        raise
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    if address is None:
        node: Any = ray_worker.global_worker.node
        with suppress(AttributeError):  # Ray's own names: with others, the processes stay
            for kind in _UNUSED:
                name = getattr(ray_constants, f"PROCESS_TYPE_{kind}")
                node._kill_process_type(name, check_alive=False, wait=True)
