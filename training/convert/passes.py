"""Forward passes that wait: each batch's pass runs in its own thread and stops before every layer of interest.

A layer of a sequential conversion is fitted to the inputs that the layers converted before it really give. Running the
model up to each layer anew costs a pass per layer; cutting a model into blocks needs code for every model. A pass that
is suspended in the middle costs neither: the model, whatever its code does, runs exactly once, and between two stops it
holds what any forward pass holds. Threads serve as coroutines here. How many run at the same time changes no bit.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.batch import Batch, forward
from tnm_pipeline.training.convert.residual import Endpoint

_here = threading.local()  # .current: the pass that this thread runs


def in_bfloat16(wanted: bool) -> torch.autocast:
    """Products of float32 in bfloat16 inside, on this thread; weights change under way, so no copy of them is kept."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=wanted, cache_enabled=False)


class _Abandoned(BaseException):
    """Unwinds a pass that nobody waits for; not an Exception, so that no handler of the model's swallows it."""


class Pass:
    """One batch on its way through a model.

    Attributes:
        index: of the batch, among those of all processes.
        batch: the input.
        stop: where it waits; `None`: it is through, or was never started.
        met: the stops where it has waited.
    """

    def __init__(self, index: int, batch: Batch, *, bfloat16: bool = False) -> None:
        self.index = index
        self.batch = batch
        self._bfloat16 = bfloat16
        self.stop: str | None = None
        self.met: set[str] = set()
        self._inputs: dict[str, list[Tensor]] = {}
        self._partners: dict[str, Tensor] = {}
        self._called: dict[str, int] = {}
        self._may_run = threading.Semaphore(0)
        self._halted = threading.Semaphore(0)
        self._abandoned = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def inputs_of(self, stop: str) -> list[Tensor]:
        """What the modules of a stop have been given so far, call by call."""
        return self._inputs.get(stop, [])

    def partner_of(self, stop: str) -> Tensor:
        """The tensor that was to be kept for a stop."""
        return self._partners[stop]

    def advance(self, model: nn.Module) -> None:
        """Run to the next stop or to the end. What the model raises is raised here."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(model,), daemon=True)
            self._thread.start()
        self._inputs.pop(self.stop or "", None)
        self._partners.pop(self.stop or "", None)
        self.stop = None
        self._may_run.release()
        self._halted.acquire()
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """End the pass where it is."""
        if self._thread is not None and self._thread.is_alive():
            self._abandoned = True
            self._may_run.release()
            self._thread.join()

    def arrive(self, stop: str, inputs: Tensor, calls: int) -> None:
        """Called on the pass's own thread: note the inputs, and on the last of so many calls wait."""
        seen = self._inputs.setdefault(stop, [])
        if len(seen) + 1 < calls:
            seen.append(inputs.clone())  # the model goes on and may change it in place
            return
        seen.append(inputs)
        self.stop = stop
        self.met.add(stop)
        self._halted.release()
        self._may_run.acquire()
        if self._abandoned:
            raise _Abandoned

    def keep(self, stop: str, tensor: Tensor) -> None:
        """Called on the pass's own thread: hold on to a tensor until the pass leaves the stop."""
        self._partners[stop] = tensor

    def count(self, key: str) -> int:
        """Called on the pass's own thread: how often it was called before with this key."""
        before = self._called.get(key, 0)
        self._called[key] = before + 1
        return before

    def _run(self, model: nn.Module) -> None:
        _here.current = self
        self._may_run.acquire()
        try:
            with torch.no_grad(), in_bfloat16(self._bfloat16):
                forward(model, self.batch)
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._inputs.clear()
            self._partners.clear()
            self._halted.release()


class Passes:
    """The passes of some batches through one model, all of them brought to one stop after the other.

    Use as a context manager; leaving it ends passes that are still on their way.

    Attributes:
        passes: in the order of their batches.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Mapping[int, Batch],
        stops: Mapping[str, Sequence[str]],
        calls: Mapping[str, int],
        partners: Mapping[str, Endpoint],
        workers: int = 1,
        *,
        bfloat16: bool = False,
    ) -> None:
        """Prepare; nothing runs yet.

        Args:
            model: in evaluation mode.
            batches: index -> input.
            stops: name of a stop -> the modules that belong to it, usually one.
            calls: stop -> how often its modules run in one forward pass: passes wait at the last of these.
            partners: stop -> a tensor to hold until passes leave the stop.
            workers: how many passes run at the same time.
            bfloat16: multiply in it; see `precision.py`.
        """
        self.passes = [Pass(index, batch, bfloat16=bfloat16) for index, batch in batches.items()]
        self._model = model
        self._stops = stops
        self._calls = calls
        self._partners = partners
        self._over: set[str] = set()
        self._pool = ThreadPoolExecutor(workers)
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        try:
            self._listen()
            self._advance(self.passes)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def leave(self, stop: str) -> None:
        """Let the passes that wait at a stop run on; none will wait there again."""
        self._over.add(stop)
        self._advance([one for one in self.passes if one.stop == stop])

    def will_meet(self, stop: str) -> bool:
        """Whether a pass is on its way that has not been at a stop: it takes another way than the first batch."""
        return any(one.stop is not None and stop not in one.met for one in self.passes)

    def _listen(self) -> None:
        # first what is kept, then where to wait: the partner of a layer may be its own input
        for stop, endpoint in self._partners.items():
            module = self._model.get_submodule(endpoint.module)
            register = module.register_forward_pre_hook if endpoint.side == "input" else module.register_forward_hook
            self._handles.append(register(self._keeper(stop, endpoint), with_kwargs=True))
        for stop, names in self._stops.items():
            for name in names:
                hook = self._hook(stop)
                module = self._model.get_submodule(name)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _advance(self, passes: Sequence[Pass]) -> None:
        for done in [self._pool.submit(one.advance, self._model) for one in passes]:
            done.result()

    def _end(self) -> None:
        self._pool.shutdown(cancel_futures=True)  # first, so that no pass starts or is on its way any more
        for one in self.passes:
            one.abandon()
        for handle in self._handles:
            handle.remove()

    def _hook(self, stop: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            current: Pass | None = getattr(_here, "current", None)
            if current is not None and stop not in self._over:
                current.arrive(stop, args[0] if args else kwargs["input"], self._calls[stop])

        return before

    def _keeper(self, stop: str, endpoint: Endpoint) -> Any:
        def at_call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any = None) -> None:
            current: Pass | None = getattr(_here, "current", None)
            if current is not None and current.count(stop) == endpoint.call:
                current.keep(stop, endpoint.pick(args, kwargs, result))

        return at_call
