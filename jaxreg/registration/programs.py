"""Programs of a registration, compiled or loaded by several threads before they are called.

XLA compiles and loads without Python's lock, so that programs which are known beforehand take as
long as the slowest of them in place of all together. They become known by a rehearsal: the code of
a registration runs once with shapes in place of arrays, and what it calls is compiled meanwhile.

To trace a program and to lower it takes Python longer than XLA takes to load it. So what a command
has compiled for a registration is kept in one file, and the next registration that is like it
traces nothing; see `jaxreg.registration.kept_programs`. And where there is a process for it, that
traces some of the programs; see `jaxreg.registration.elsewhere`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import gc
import inspect
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Generic, NamedTuple, ParamSpec, Protocol, Self, TypeVar

import jax
import jax.monitoring
import numpy as np
from jax.typing import ArrayLike

from jaxreg.registration import elsewhere, kept_programs
from jaxreg.registration.kept_programs import Entry, Executable, Key

__all__ = [
    "LOADED",
    "WAITED",
    "Compiler",
    "Fixed",
    "Program",
    "Tracer",
    "Work",
    "changed_fields",
    "compiling",
    "on_device",
    "rehearse",
    "settled",
    "shapes_of",
    "without_collections",
]

LOADED = "/jaxreg/program_load_duration"
"""The event of `jax.monitoring` that tells how long it took to load a program that was kept."""

WAITED = "/jaxreg/waited_for_program_duration"
"""The event of `jax.monitoring` that tells how long a thread waited for what another compiles."""

_MOST = 128
"""So many programs of one registration are kept, at most: some follow from what is in files."""

_LARGE = 2**30
"""Bytes that are worth waiting for."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Fixed:
    """An argument of a rehearsed function that is no array: a pytree without leaves."""

    value: Any
    """It has a hash."""


class Program(Generic[_P, _R]):
    """A function that runs as one program, as by `jax.jit`.

    Within a rehearsal it is compiled; what a thread's `Work` has compiled is called.

    Parameters
    ----------
    function
        Of arrays by their positions, and of what it is compiled for by names.
    static
        These names.
    donated
        Arguments whose memory the program may write to. Within a transformation it may not: under
        ``vmap`` the first fields are those of all pairs.
    like
        Returns, of the same arguments, arrays shaped like the results: a rehearsal then goes on
        without tracing the program, which another process does, or this one in the end. What comes
        after it may take longer to be compiled.
    """

    def __init__(
        self,
        function: Callable[_P, _R],
        *,
        static: Sequence[str] = (),
        donated: Sequence[str] = (),
        like: Callable[_P, _R] | None = None,
    ) -> None:
        functools.update_wrapper(self, function)
        self.name = f"{function.__module__}.{function.__qualname__}"
        self.function = function
        places = list(inspect.signature(function).parameters)
        self.donated = tuple(places.index(name) for name in donated)
        """The places of these arguments."""
        self._like = like
        self._within = jax.jit(function, static_argnames=static)
        self.jitted = self._within
        if donated:
            self.jitted = jax.jit(function, static_argnames=static, donate_argnames=donated)

    def __call__(self, *args: _P.args, **static: _P.kwargs) -> _R:
        """Run the program."""
        if _is_rehearsal.get():
            token = _is_rehearsal.set(False)  # what is called within is a part of this program
            try:
                work = _work.get()
                if work is not None and work.is_over:
                    raise _OverError
                if work is not None and self._like is not None:
                    call = _Call(self, shapes_of(args), static)
                    if not work.hand_over(call):
                        work.put_off(call)
                    return self._like(*args, **static)
                result: _R = self.jitted(*args, **static)
                # At once, as the next one takes long to be traced, too.
                if work is not None:
                    with contextlib.suppress(Exception):
                        work.begin(_Call(self, shapes_of(args), static))
                return result
            finally:
                _is_rehearsal.reset(token)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
            result = self._within(*args, **static)
            return result
        work, call = _work.get(), _Call(self, args, static)
        found = None if work is None else work.find(call)
        if work is None or found is None:
            result = self.jitted(*args, **static)
            return result
        try:
            result = found(*args)
        except Exception:
            anew = work.anew(call)
            if anew is None:
                raise
            result = anew(*args)
        return result


def changed_fields(before: Any, after: Any) -> dict[str, Any]:
    """Return the fields of a named tuple that are other arrays than before, by their names.

    A program returns a copy of what it was given; so it returns nothing of that.
    """
    return {name: x for name, x in after._asdict().items() if x is not getattr(before, name)}


def settled(tree: _R) -> _R:
    """Return arrays, a pytree; large ones only when they are there.

    A program gets its memory when it is called, while the one before may still run: where arrays
    fill a device, both together would need more than there is.
    """
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    if sum(x.nbytes for x in arrays) >= _LARGE and not any(
        isinstance(x, jax.core.Tracer) for x in arrays
    ):
        jax.block_until_ready(arrays)  # type: ignore[no-untyped-call]
    return tree


def on_device(array: ArrayLike) -> jax.Array:
    """Bring an array to the device; for one of the host's no program has to be made."""
    found: jax.Array = jax.device_put(array)
    return found


class _Call(NamedTuple):
    """A program with its arguments, or with their shapes."""

    program: Program[Any, Any]
    args: tuple[Any, ...]
    static: dict[str, Any]

    def key(self) -> Key | None:
        """Return what tells the compiled program from all others.

        There is none for what is bound to other devices than the one that programs run on. To that
        one JAX binds the results of programs that another process has traced.
        """
        leaves, tree = jax.tree.flatten(self.args)
        bound = [x.sharding.device_set for x in leaves if getattr(x, "committed", False)]
        devices = frozenset().union(*bound)
        if any(not hasattr(x, "dtype") for x in leaves) or (devices and devices != {_device()}):
            return None
        kinds = tuple((x.shape, x.dtype.name, x.weak_type) for x in map(_kind, leaves))
        is_wide = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
        return self.program.name, tuple(sorted(self.static.items())), tree, kinds, is_wide

    def has_its_arguments(self) -> bool:
        """Whether no program has written to their memory."""
        arrays = (x for x in jax.tree.leaves(self.args) if isinstance(x, jax.Array))
        return not any(array.is_deleted() for array in arrays)

    def lowered(self) -> jax.stages.Lowered:
        """Return the program in the form that XLA compiles."""
        return _lowered(self.program.jitted, self.args, **self.static)


def _lowered(jitted: Any, args: Sequence[Any], **static: Any) -> jax.stages.Lowered:
    lowered: jax.stages.Lowered = jitted.lower(*shapes_of(args), **static)
    return lowered


def _kind(array: Any) -> jax.ShapeDtypeStruct:
    weak = bool(getattr(array, "weak_type", False))
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    kind = jax.ShapeDtypeStruct(np.shape(array), dtype, weak_type=weak)  # type: ignore[no-untyped-call]
    return kind


def shapes_of(arrays: Any) -> Any:
    """Return a pytree with shapes, of `jax.ShapeDtypeStruct`, in place of its arrays."""
    return jax.tree.map(_kind, arrays)


class _OverError(Exception):
    """Ends a rehearsal for what will not be called any more."""


_is_rehearsal: ContextVar[bool] = ContextVar("is_rehearsal", default=False)
"""Whether programs that are called are to be compiled."""


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Trace without looking for garbage, which takes a sixth of the time: most of it is no garbage.

    Another thread that has done so before may end it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def rehearse(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function with shapes in place of arrays, and have compiled what it calls.

    Parameters
    ----------
    function
        Of pytrees of arrays. JAX remembers a rehearsal: the next one of the same function with the
        same shapes meets nothing.
    *args
        Arrays, or `jax.ShapeDtypeStruct` in their places.

    Returns
    -------
    Any
        The shapes of what the function returns; `None` if it fails, or asks for values. What it has
        called by then is compiled, and when it is called in earnest it tells what failed.
    """
    token = _is_rehearsal.set(True)
    try:
        return jax.eval_shape(function, *args)
    except Exception:
        return None
    finally:
        _is_rehearsal.reset(token)
        if (work := _work.get()) is not None:
            work.begin_what_was_put_off()


class _Compiled:
    """A program that is compiled, and what is kept of it.

    Parameters
    ----------
    executable
        The program.
    entry
        What is kept, if that is there.
    key
        That of what is to be kept, if anything is.
    gives_bytes_once
        Whether it gives them no more when it has run.
    """

    def __init__(
        self,
        executable: Executable,
        entry: Entry | None,
        key: Key | None = None,
        *,
        gives_bytes_once: bool = False,
    ) -> None:
        self._executable, self._entry, self._key = executable, entry, key
        self._gives_bytes_once = gives_bytes_once
        self._lock = threading.Lock()

    @classmethod
    def loaded(cls, entry: Entry, device: jax.Device) -> _Compiled:
        began = time.perf_counter()
        executable = entry.load(device)
        seconds = time.perf_counter() - began
        jax.monitoring.record_event_duration_secs(LOADED, seconds, fun_name=entry.name)
        return cls(executable, entry)

    def entry(self) -> Entry | None:
        """Return what is kept of it, if anything is.

        Its bytes are taken when they are first asked for, which holds Python's lock.
        """
        with self._lock:
            if self._key is not None:
                self._entry, self._key = Entry.of(self._key, self._executable), None
            return self._entry

    def executable(self) -> Executable:
        """Return the program, to run it."""
        if self._gives_bytes_once:
            self.entry()
        return self._executable


class Tracer(Protocol):
    """Has programs traced by another process."""

    def begin(self) -> None:
        """Begin to start the process, if nobody has."""

    def submit(self, request: bytes, done: Callable[[bytes | None], None]) -> bool:
        """Have a request answered; return whether anybody will try.

        Parameters
        ----------
        request
            That of `jaxreg.registration.elsewhere`.
        done
            Takes the answer, `None` if there is none; called by any thread.
        """

    def help(self) -> None:
        """Take back, and give no answer to, what no process has begun."""


class Compiler:
    """Compiles programs, or loads them from a folder, in threads of its own.

    Parameters
    ----------
    folder
        Where what it has compiled is kept, if anywhere. Who can write there can have this process
        run what they like.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "compiler")
        self._lock, self._taking = threading.Lock(), threading.Lock()
        self.has_news = threading.Condition()
        """Told when a program is begun, and when a rehearsal has ended."""
        self._programs: dict[Key, Future[_Compiled]] = {}
        self._loaded: set[Key] = set()
        """Those that come from a file."""
        self._kept: dict[Path, dict[Key, Entry]] = {}
        self._tracing = 0
        """How many threads trace programs."""
        self._untaken: list[_Compiled] = []
        """Those whose bytes are taken when no thread does any more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """End. What has not been begun is not compiled any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def working(self) -> Iterator[Work]:
        """Have what this thread calls compiled; in the end it is kept."""
        work = Work(self)
        token = _work.set(work)
        try:
            yield work
            work.keep()
        finally:
            work.is_over = True
            _work.reset(token)

    def has_nothing(self) -> bool:
        """Whether nothing is kept that could be loaded, so that programs will be traced."""
        return self.folder is None or not any(self.folder.glob(f"*{kept_programs.SUFFIX}"))

    def run(self, function: Callable[[Work], _R]) -> _R:
        """Return what a function returns whose programs are compiled, and in the end kept.

        A device tells only later what is wrong with a program, when others have been called. So if
        one fails, and some had been loaded, the function runs again without those.
        """
        with self.working() as work:
            try:
                return function(work)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" in str(error) or not work.forget():
                    raise
        return self.run(function)

    def load(self, path: Path, device: jax.Device) -> bool:
        """Begin to load the programs of a file; return whether there are any."""
        with self._lock:
            if path not in self._kept:
                self._kept[path] = kept_programs.read(path)
                for key, entry in self._kept[path].items():
                    if key not in self._programs:
                        self._programs[key] = self._pool.submit(_Compiled.loaded, entry, device)
                        self._loaded.add(key)
            return bool(self._kept[path])

    def begin(self, key: Key, call: _Call, *, keep: bool, gives_bytes_once: bool) -> None:
        """Begin to compile a program, unless that is done."""
        with self._lock:
            if key not in self._programs:
                lowered = call.lowered()
                self._programs[key] = self._pool.submit(
                    self._compiled, key if keep else None, lowered, gives_bytes_once
                )
        with self.has_news:
            self.has_news.notify_all()

    def hand_over(
        self,
        tracer: Tracer,
        request: bytes,
        key: Key,
        lower: Callable[[bytes | None], jax.stages.Lowered],
        *,
        keep: bool,
        gives_bytes_once: bool,
    ) -> bool:
        """Begin to compile a program that another process traces, unless that is done.

        Parameters
        ----------
        tracer, request
            What asks it, for what.
        key
            That of the call.
        lower
            Of the answer, or of none; called by any thread.
        keep, gives_bytes_once
            As for `begin`.

        Returns
        -------
        bool
            Whether it will be compiled.
        """
        future: Future[_Compiled] = Future()

        def done(answer: bytes | None) -> None:
            try:
                lowered = lower(answer)
                compiling = self._pool.submit(
                    self._compiled, key if keep else None, lowered, gives_bytes_once
                )
            except Exception as error:
                future.set_exception(error)
            else:
                compiling.add_done_callback(functools.partial(_pass_on, to=future))

        with self._lock:
            if key in self._programs:
                return True
            if not tracer.submit(request, done):
                return False
            self._programs[key] = future
        with self.has_news:
            self.has_news.notify_all()
        return True

    def _compiled(
        self, key: Key | None, lowered: jax.stages.Lowered, gives_bytes_once: bool
    ) -> _Compiled:
        executable = lowered.compile()
        compiled = _Compiled(executable, None, key, gives_bytes_once=gives_bytes_once)
        with self._taking:
            self._untaken.append(compiled)
        self._take()
        return compiled

    def _take(self) -> None:
        """Begin to take the bytes of programs, unless programs are traced."""
        with self._taking:
            if not self._tracing:
                untaken, self._untaken = self._untaken, []
                with contextlib.suppress(RuntimeError):  # it has ended
                    for compiled in untaken:
                        self._pool.submit(compiled.entry)

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Take no bytes of programs meanwhile: that holds Python's lock, which tracing needs."""
        with self._taking:
            self._tracing += 1
        try:
            yield
        finally:
            with self._taking:
                self._tracing -= 1
            self._take()

    def get(self, key: Key | None) -> Future[_Compiled] | None:
        """Return what will be a program, if it was begun."""
        return None if key is None else self._programs.get(key)

    def replace(self, key: Key, failed: Future[_Compiled]) -> bool:
        """Forget what was loaded and has failed; return whether it may be begun anew."""
        with self._lock:
            if self._programs.get(key) is not failed:  # another thread has done so
                return True
            if key not in self._loaded:
                return False
            self._forget([key])
            return True

    def forget(self, keys: Collection[Key], path: Path) -> bool:
        """Forget those of the programs that were loaded, and a file; return whether any was."""
        with self._lock:
            loaded = self._loaded.intersection(keys)
            if not loaded:
                return False
            self._forget(loaded)
            self._kept[path] = {}
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return True

    def _forget(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._loaded.discard(key)
            self._programs.pop(key, None)
            for entries in self._kept.values():
                entries.pop(key, None)

    def keep(self, path: Path, keys: Iterable[Key]) -> None:
        """Write programs to a file, if it does not have all of them."""
        with self._lock:
            entries, has_more = self._kept[path], False
            for key in keys:
                entry = entries.pop(key, None)
                if entry is None:
                    entry = _entry(self._programs.get(key))
                    has_more |= entry is not None
                if entry is not None:
                    entries[key] = entry  # what was used last is at the end
            if has_more:
                for key in list(entries)[:-_MOST]:
                    del entries[key]
                kept_programs.write(path, entries)


def _pass_on(future: Future[_R], to: Future[_R]) -> None:
    """Give the outcome of a future to another one."""
    if future.cancelled():
        to.cancel()
    elif (error := future.exception()) is not None:
        to.set_exception(error)
    else:
        to.set_result(future.result())


def _entry(future: Future[_Compiled] | None) -> Entry | None:
    is_there = future is not None and future.done() and not future.cancelled()
    if future is None or not is_there or future.exception() is not None:
        return None
    return future.result().entry()


class Work:
    """What a thread has compiled for a registration."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._path: Path | None = None
        self._gives_bytes_once = True
        self._used: dict[Key, None] = {}
        self._put_off: list[_Call] = []
        self.afterwards: Callable[[Any, Any], None] | None = None
        """Rehearses what comes after the stages, for the shapes of the displacement that they find
        and of its inverse."""
        self.beside: Callable[[], contextlib.AbstractContextManager[Any]] | None = None
        """Enters, in a thread that rehearses, what this one has entered that JAX keeps for each
        thread: then stages run beside their rehearsal. `None`: it comes before them, in the same
        thread, since nobody else knows what a user has entered."""
        self.tracer: Tracer | None = None
        """Has traced what a rehearsal puts off, if stages run beside it."""
        self._platform: str | None = None
        """What is lowered for, where another process may do it."""
        self._rehearsal: threading.Thread | None = None
        self._is_rehearsed = True
        self.is_over = False
        """Whether nothing is called any more."""

    def will_trace(self) -> bool:
        """Whether it is known beforehand that no earlier registration has left anything."""
        return self._compiler.has_nothing()

    def is_kept(self, *about: Any) -> bool:
        """Begin to load what an earlier registration has left, if one was like this.

        Parameters
        ----------
        *about
            All that its programs follow from, but for this package and where it runs.

        Returns
        -------
        bool
            Whether anything is there. Otherwise it will be.
        """
        folder = self._compiler.folder
        if folder is None:
            return False
        device = _device()
        # The CPU's compiler does not give those of every program when that has run.
        self._gives_bytes_once = device.platform == "cpu"
        digest = kept_programs.digest(about, device)
        if digest is None:
            return False
        self._path = folder / f"{digest}{kept_programs.SUFFIX}"
        return self._compiler.load(self._path, device)

    def rehearse(self, function: Callable[[], None]) -> None:
        """Call what rehearses this work, in a thread of its own if it may be beside this one."""

        def call() -> None:
            with without_collections(), self._compiler.tracing():
                try:
                    function()
                finally:
                    if self.tracer is not None:
                        self.tracer.help()

        if self.beside is None:
            call()
            return
        enter = self.beside
        if self.tracer is not None:
            self.tracer.begin()
            self._platform = elsewhere.platform_of(_device())

        def call_in_thread() -> None:
            try:
                with contextlib.suppress(Exception), enter():
                    call()
            finally:
                with self._compiler.has_news:
                    self._is_rehearsed = True
                    self._compiler.has_news.notify_all()

        self._is_rehearsed = False
        context = contextvars.copy_context()
        # As those that compile are called: a process that is interrupted does not wait for it.
        self._rehearsal = threading.Thread(
            target=context.run, args=(call_in_thread,), name="compiler_rehearsal"
        )
        self._rehearsal.start()

    def _wait_for(self, key: Key | None) -> None:
        """Wait until a program is begun, if it may be in what is still rehearsed."""

        def is_known() -> bool:
            return self._is_rehearsed or self._compiler.get(key) is not None

        if key is None or is_known():
            return
        began = time.perf_counter()
        with self._compiler.has_news:
            self._compiler.has_news.wait_for(is_known)
        jax.monitoring.record_event_duration_secs(WAITED, time.perf_counter() - began)

    def hand_over(self, call: _Call) -> bool:
        """Have a program traced by another process; return whether one will try."""
        key, enter = call.key(), self.beside
        if self.tracer is None or enter is None or key is None or self._platform is None:
            return False
        request = elsewhere.request(call.program, key, self._platform)
        if request is None:
            return False

        def lower(answer: bytes | None) -> jax.stages.Lowered:
            if self.is_over:
                raise _OverError
            with enter():
                if answer is not None:
                    with contextlib.suppress(Exception):
                        return _lowered(elsewhere.jitted(call.program, answer), call.args)
                return call.lowered()

        is_begun = self._compiler.hand_over(
            self.tracer,
            request,
            key,
            lower,
            keep=self._path is not None,
            gives_bytes_once=self._gives_bytes_once,
        )
        if is_begun:
            self._used[key] = None
        return is_begun

    def put_off(self, call: _Call) -> None:
        """Have a program compiled when a rehearsal ends."""
        self._put_off.append(call)

    def begin_what_was_put_off(self) -> None:
        """Have programs compiled that were put off."""
        calls, self._put_off = self._put_off, []
        for call in calls:
            with contextlib.suppress(Exception):
                if not self.is_over:
                    self.begin(call)

    def begin(self, call: _Call) -> None:
        """Have a program compiled, if it is not yet."""
        key = call.key()
        if key is not None:
            keep = self._path is not None
            self._compiler.begin(key, call, keep=keep, gives_bytes_once=self._gives_bytes_once)
            self._used[key] = None

    def find(self, call: _Call) -> Executable | None:
        """Return a program that was begun, or is to be kept; wait for it."""
        key = call.key()
        self._wait_for(key)
        if self._path is not None:
            self.begin(call)
        future = self._compiler.get(key)
        if key is None or future is None:
            return None
        self._used[key] = None
        if not future.done():
            began = time.perf_counter()
            future.exception()
            jax.monitoring.record_event_duration_secs(WAITED, time.perf_counter() - began)
        if future.exception() is None:
            return future.result().executable()
        # What does not compile fails again where it is called as ever, and tells.
        return self.find(call) if self._compiler.replace(key, future) else None

    def anew(self, call: _Call) -> Executable | None:
        """Return what is compiled in place of a program that was loaded, and failed.

        `None` if it was not loaded, or has written to its arguments.
        """
        key = call.key()
        future = self._compiler.get(key)
        if key is None or future is None or not call.has_its_arguments():
            return None
        return self.find(call) if self._compiler.replace(key, future) else None

    def forget(self) -> bool:
        """Forget what was loaded, and its file; return whether anything was used of it."""
        return self._path is not None and self._compiler.forget(self._used, self._path)

    def keep(self) -> None:
        """Write what was used, if that is more than what was there."""
        if self._rehearsal is not None:
            self._rehearsal.join()
        if self._path is not None:
            self._compiler.keep(self._path, self._used)


_work: ContextVar[Work | None] = ContextVar("work", default=None)


@contextlib.contextmanager
def compiling() -> Iterator[Work]:
    """Have what this thread calls compiled ahead: by the work that it does already, or by one."""
    work = _work.get()
    if work is not None:
        yield work
        return
    with Compiler() as compiler, compiler.working() as work:
        yield work


def _device() -> jax.Device:
    """Return the device that programs run on by default."""
    (device,) = jax.device_put(np.float32(0)).devices()
    return device
