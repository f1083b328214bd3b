"""Workers from Flower's simulation engine: its pool of Ray actors, each with the base model resident.

The engine's own server side (`flwr run`) would add a SuperLink and polling to each message and could not order clients
by cost; its actors, which do the work, are the same. They are reached by the interface Flower gives simulation
backends, so an incompatible release is detected when the worker pool is made, not in the middle of a run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.federation.workers import RUN, WorkerCall
from fedtune.types import ConfigError, Problem

Make = Callable[[Any, str], ClientApp]
VISIBLE = "CUDA_VISIBLE_DEVICES"

# in an actor's process: the clients of each run under way that it has met
_met: dict[str, ClientApp] = {}


@dataclass
class Clients:
    """Makes the ClientApp that Flower's actors run; it serves every run whose spec is registered.

    Attributes:
        make: returns a run's clients from its spec, on a device; called once per run and actor.
        device: "cuda" or "cpu"; Ray shows an actor its own GPU only.
        specs: run under way -> Ray's reference to its spec.
    """

    make: Make
    device: str
    specs: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> ClientApp:
        """Return the ClientApp; called by Flower in the actor, for every message."""
        app = ClientApp()
        app.train()(self._answer)
        return app

    def _answer(self, message: Message, context: Context) -> Message:
        run = str(context.run_config[RUN])
        for over in set(_met) - set(self.specs):
            del _met[over]
        if run not in _met:
            import ray

            _met[run] = self.make(ray.get(self.specs[run]), self.device)
        return _met[run](message, context)


@contextmanager
def _environment(devices: Sequence[str]) -> Iterator[None]:
    """Show Ray the named GPUs while it starts; what Flower does to PYTHONPATH for its actors goes as well."""
    before = {name: os.environ.get(name) for name in (VISIBLE, "PYTHONPATH")}
    numbers = [int(d.partition(":")[2]) for d in devices if d.startswith("cuda")]
    if numbers:
        names = (before[VISIBLE] or "").split(",")
        os.environ[VISIBLE] = ",".join(names[n] if names != [""] else str(n) for n in numbers)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({name: value} if value is not None else {})


def _backend(devices: Sequence[str]) -> Any:
    """Start Flower's Ray backend with one actor for each device.

    Raises:
        ConfigError: it is not installed, or Flower has moved it.
    """
    try:
        import ray  # noqa: F401  # Flower's module would fail with it, and say less
        from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend
    except ImportError as err:
        problem = Problem("engine.executor", f"ray: {err}", "pip install 'fedtune[simulation]'")
        raise ConfigError("settings", [problem]) from err
    gpus = sum(device.startswith("cuda") for device in devices)
    quiet = {"log_to_driver": False, "configure_logging": False}
    start: dict[str, Any] = {"num_cpus": len(devices), "num_gpus": gpus, **quiet}
    share: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1 if gpus else 0}
    logging.getLogger("flwr").setLevel(logging.WARNING)  # it tells of its own insides by default
    with _environment(devices):
        return RayBackend({"init_args": start, "client_resources": share})


class FlowerWorkers:
    """One of Flower's Ray actors for each device.

    Args:
        devices: names, all "cpu" or all "cuda:N".
        make: see `Clients`.

    Raises:
        ConfigError: Flower's simulation engine is not installed.
    """

    def __init__(self, devices: Sequence[str], make: Make) -> None:
        self._backend = _backend(devices)
        self._clients = Clients(make, devices[0].partition(":")[0])
        self._backend.build(self._clients)
        self._pool = self._backend.pool
        self.count = int(self._backend.num_workers)
        self._doing: dict[Any, int] = {}

    def prepare(self, run: str, spec: Any) -> None:
        """Put a run's spec where every actor can read it."""
        import ray

        self._clients.specs[run] = ray.put(spec)

    def release(self, run: str) -> None:
        """Forget the spec of a run; the actors forget it with the next message they get."""
        self._clients.specs.pop(run, None)

    def start(self, worker: int, task: WorkerCall) -> None:
        """Send a message to an actor that is free."""
        job = self._clients, task.message, str(task.context.node_config["partition-id"]), task.context
        self._doing[self._pool.submit(lambda actor, *words: actor.run.remote(*words), job)] = worker

    def finished(self, timeout: float | None = None) -> tuple[int, Message | Exception] | None:
        """Wait for any actor; one that has died is replaced."""
        import ray

        try:
            ready, _ = ray.wait(list(self._doing), num_returns=1, timeout=timeout)
        except SystemError as err:  # what Ray makes of a signal's handler that raises
            raise err.__cause__ or err from None
        if not ready:
            return None
        done = ready[0]
        worker = self._doing.pop(done)
        try:
            reply, _ = self._pool.fetch_result_and_return_actor_to_pool(done)
        except ray.exceptions.RayActorError as err:
            self._pool.add_actors_to_pool(1)
            return worker, err
        except Exception as err:  # of the client, or of loading the model
            self._pool.add_actor_back_to_pool(done)
            return worker, err
        return worker, reply

    def abandon(self, worker: int) -> None:
        """Kill an actor in the middle of its task, and start another."""
        import ray

        job = next(job for job, busy in self._doing.items() if busy == worker)
        del self._doing[job]
        ray.kill(self._pool._future_to_actor.pop(job))
        self._pool.num_actors -= 1
        self._pool.add_actors_to_pool(1)

    def close(self) -> None:
        """End the actors, and Ray with them."""
        self._backend.terminate()
