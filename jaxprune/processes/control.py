"""Connections that make the processes of a run end together.

If a process dies, JAX aborts the others only after minutes, with a stack trace. So the processes
connect before JAX starts: each one connects to the first, at the port after the coordinator's, and
sends its options. If all options agree, JAX starts, and the connections stay open. A process that
fails reports it, and the connection of a killed process closes. The first process forwards the
failure, and every process ends.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn

import jax

from convert.errors import joined
from jaxprune.errors import Change, InputError
from jaxprune.processes.collective import differences

MEETING_SECONDS = 300
"""Seconds that the processes wait for each other at the start."""
PARTING_SECONDS = 20
"""Seconds that a failed process waits for the others to receive its failure."""
MESSAGE_BYTES = 2**22
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2}
"""Socket options with which a host that stops answering is noticed after 20 s."""
LOST = "it ended without saying why: it was killed, or its host or the network failed"


class Group(NamedTuple):
    """The processes of a run.

    Attributes:
        host: the host of the first process.
        port: the port of JAX's coordinator on that host; this module uses the next port.
        processes: the number of processes.
        number: the number of this process, from 0.
    """

    host: str
    port: int
    processes: int
    number: int

    @classmethod
    def of(cls, coordinator: str, processes: int | None, number: int | None) -> "Group":
        """Returns the group of a coordinator.

        Args:
            coordinator: host:port, or `auto`: detected from SLURM, Open MPI or a TPU pod.
            processes: the number of processes; None for `auto`.
            number: the number of this process; None for `auto`.

        Raises:
            InputError: nothing is detected.
        """
        if coordinator == "auto":
            coordinator, processes, number = _detected()
        assert processes is not None and number is not None
        host, _, port = coordinator.rpartition(":")
        return cls(host.strip("[]"), int(port), processes, number)


class Failure(NamedTuple):
    """The end of a process.

    Attributes:
        process: the number of the process; None: all processes, because they do not fit together.
        status: its exit status; None: unknown. 0 means success.
        text: the reason, on one line.
    """

    process: int | None
    status: int | None
    text: str

    def __str__(self) -> str:
        return (
            self.text
            if self.process is None
            else f"process {self.process} of this run: {self.text}"
        )


End = Callable[[Failure], NoReturn]
"""Ends this process because another one failed."""


class Control:
    """The connections of this process. The first process is connected to each of the others; each
    of these only to the first.

    Args:
        group: the processes.
        connections: process number -> connection.
        end: ends this process.
    """

    def __init__(self, group: Group, connections: Mapping[int, Connection], end: End) -> None:
        self._group, self._connections, self._end = group, dict(connections), end
        self._finished: set[int] = set()
        self._changed = threading.Condition()
        self._leaving = False

    def listen(self) -> None:
        """Listens to the other processes, in background threads."""
        for number, connection in self._connections.items():
            threading.Thread(target=self._listen, args=(number, connection), daemon=True).start()

    def leave(self, status: int, text: str) -> None:
        """Notifies the other processes how this one ends, and waits until they have received it.

        After success it waits until all processes have ended; a failure of another process still
        ends this one.
        """
        with self._changed:
            self._leaving = status != 0
        self._send(Failure(self._group.number, status, text))
        if status == 0:
            self._wait(None)
        elif self._group.number == 0:
            self._wait(PARTING_SECONDS)

    def notice_aborts(self) -> None:
        """Ends this process in order if JAX aborts it because the first process, its coordinator,
        is gone.

        The abort comes from one of JAX's own threads as soon as the connection breaks, so no Python
        thread is faster. All other aborts proceed.
        """

        def aborted(_: int) -> None:
            if self._group.number and self._is_first_lost():
                self._end(Failure(0, None, LOST))

        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)  # C keeps no reference to it
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)

    def _is_first_lost(self) -> bool:
        """Returns whether the connection to the first process closes within two seconds."""
        with socket.socket(fileno=os.dup(self._connections[0].fileno())) as own:
            readable, _, _ = select.select([own], [], [], 2)
            try:
                return bool(readable) and own.recv(1, socket.MSG_PEEK) == b""
            except OSError:
                return True

    def _listen(self, number: int, connection: Connection) -> None:
        while (found := _receive(connection)) is not None:
            self._finish(number)
            if (failure := Failure(**found)).status != 0:
                self._fail(failure)
        if number not in self._finished:
            self._finish(number)
            self._fail(Failure(number, None, LOST))

    def _finish(self, number: int) -> None:
        with self._changed:
            self._finished.add(number)
            self._changed.notify_all()

    def _fail(self, failure: Failure) -> None:
        with self._changed:
            if self._leaving:
                return
            self._leaving = True
        if self._group.number == 0:
            self._send(failure)
            self._wait(PARTING_SECONDS)
        self._end(failure)

    def _send(self, failure: Failure) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # it has ended as well
                connection.send_bytes(json.dumps(failure._asdict()).encode())

    def _wait(self, seconds: float | None) -> None:
        """Waits until each of the other processes has reported its end or closed its connection."""
        with self._changed:
            self._changed.wait_for(lambda: self._connections.keys() <= self._finished, seconds)


_control: Control | None = None
"""One per process, like JAX's own connection, because signals and exit statuses are per process
too."""
_meets = False
"""Whether `join` has started; failures are then reported to the other processes."""


def join(group: Group, asked: Mapping[str, Any], end: End) -> None:
    """Connects this process to the others of its run and starts JAX on all devices.

    Args:
        group: the processes.
        asked: all options of this process, as JSON; they must be the same on all processes.
        end: ends this process when another one has failed; called in a thread.

    Raises:
        InputError: another process does not connect, has failed, or has other options.
    """
    global _control, _meets
    _meets = True
    meet = _wait_for_others if group.number == 0 else _connect
    connections = meet(group, {"asked": asked}, MEETING_SECONDS)
    _control = Control(group, connections, end)
    _control.listen()
    _control.notice_aborts()
    address = f"[{group.host}]" if ":" in group.host else group.host
    try:
        jax.distributed.initialize(
            f"{address}:{group.port}",
            group.processes,
            group.number,
            initialization_timeout=MEETING_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"cannot join the other processes at {address}:{group.port} ({error})",
            options={"coordinator": Change.OTHER},
        ) from error


def leave(status: int, text: str) -> None:
    """Notifies the other processes how this one ends, see `Control.leave`; does nothing for a
    single process.

    Args:
        status: the exit status.
        text: the reason, on one line; "" for status 0.
    """
    if _control:
        _control.leave(status, text)


def is_joined() -> bool:
    """Returns whether this process is one of several, or has started to connect to others."""
    return _meets


def refuse(group: Group, status: int, text: str) -> None:
    """Notifies waiting processes that this one will not join; arguments as for `leave`."""
    failure = Failure(group.number, status, text)
    meet = _wait_for_others if group.number == 0 else _connect
    with contextlib.suppress(InputError):  # this failure itself, or no process answers
        meet(group, {"failure": failure._asdict()}, PARTING_SECONDS)


def _connect(group: Group, hello: Mapping[str, Any], seconds: float) -> dict[int, Connection]:
    """Connects to the first process and waits for its answer."""
    deadline = time.monotonic() + seconds
    address = group.host, group.port + 1
    while True:
        try:
            connection = _connection(socket.create_connection(address, timeout=5))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"the first process did not answer at {group.host}:{address[1]} within "
                    f"{seconds:g} s ({error})",
                    options={"coordinator": Change.OTHER},
                ) from None
            time.sleep(0.2)
    with contextlib.suppress(OSError):
        connection.send_bytes(json.dumps({"number": group.number, **hello}).encode())
    answer = _receive(connection)  # the first process answers after all have connected
    if answer is None:
        raise InputError(str(Failure(0, None, LOST)))
    if failure := answer.get("failure"):
        raise InputError(str(Failure(**failure)))
    return {0: connection}


def _wait_for_others(
    group: Group, hello: Mapping[str, Any], seconds: float
) -> dict[int, Connection]:
    """Accepts the other processes, compares the options of all, and answers."""
    met: dict[int, tuple[Connection, Mapping[str, Any]]] = {}
    failures = [Failure(**hello["failure"])] if "failure" in hello else []
    deadline = time.monotonic() + seconds
    with _server(group.port + 1) as server:
        while len(met) < group.processes - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection = _connection(server.accept()[0])
            except TimeoutError:
                break
            found = _receive(connection, 5) or {}
            number = found.get("number")
            if not isinstance(number, int) or not 0 < number < group.processes:
                connection.close()  # not a process of this run
                continue
            if number in met:
                failures.append(Failure(number, None, "two processes have this number"))
            met[number] = connection, found
            if "failure" in found:
                failures.append(Failure(**found["failure"]))
            if failures:  # processes that have not connected soon will not connect at all
                deadline = min(deadline, time.monotonic() + PARTING_SECONDS)
    if not failures:
        failures = _disagreements(group, hello, met, seconds)
    for connection, _ in met.values():
        with contextlib.suppress(OSError):
            connection.send_bytes(
                json.dumps({"failure": failures[0]._asdict()} if failures else {}).encode()
            )
    if failures:
        raise InputError(str(failures[0]))
    return {number: connection for number, (connection, _) in met.items()}


def _disagreements(
    group: Group,
    hello: Mapping[str, Any],
    met: Mapping[int, tuple[Connection, Mapping[str, Any]]],
    seconds: float,
) -> list[Failure]:
    """Returns the reasons why connected processes cannot work together."""
    if missing := [number for number in range(1, group.processes) if number not in met]:
        return [Failure(missing[0], None, f"it did not come within {seconds:g} s")]
    asked = [hello["asked"], *(met[number][1].get("asked", {}) for number in sorted(met))]
    different = differences(asked)
    return (
        [Failure(None, None, f"the processes were asked different things: {joined(different)}")]
        if different
        else []
    )


def _server(port: int) -> socket.socket:
    """Listens at a port, on all addresses of this host.

    Raises:
        InputError: the port cannot be used.
    """
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        )
    except OSError as error:
        raise InputError(
            f"cannot listen at port {port} ({error})", options={"coordinator": Change.OTHER}
        ) from error


def _connection(connected: socket.socket) -> Connection:
    connected.settimeout(None)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if option := getattr(socket, name, None):  # macOS lacks some of them
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
    return Connection(connected.detach())


def _receive(connection: Connection, seconds: float | None = None) -> dict[str, Any] | None:
    """Returns a message; None if the connection is closed, nothing arrives in time, or it is not a
    JSON object."""
    try:
        if seconds is not None and not connection.poll(seconds):
            return None
        found = json.loads(connection.recv_bytes(MESSAGE_BYTES))
    except (OSError, EOFError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _detected() -> tuple[str, int, int]:
    """Returns the coordinator, the number of processes and this one's number, as JAX detects them
    in the environment.

    JAX has no public function for this: `jax.distributed.initialize` detects them and starts at
    once.
    """
    from jax._src import clusters

    try:
        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        coordinator, processes, number, *_ = detect(None, None, None, None, None, MEETING_SECONDS)
    except Exception as error:
        raise InputError(
            f"JAX {jax.__version__} cannot find the other processes ({error})",
            options={"coordinator": Change.OTHER},
        ) from error
    if coordinator is None or processes is None or number is None:
        raise InputError(
            "neither SLURM, Open MPI nor a TPU pod is found here",
            options={"coordinator": Change.OTHER},
        )
    return coordinator, processes, number
