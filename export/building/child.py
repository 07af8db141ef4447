"""The process that builds one plan: a request comes in on stdin, events go out on stdout, one JSON array per line.

Builders crash, stall and run out of memory inside libraries that no exception leaves. Here they may. Whatever the
libraries print goes to stderr. When stdin closes, the asking process is gone, and this one ends too.
"""

import importlib
import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tnm_pipeline.export.building.builder import build
from tnm_pipeline.export.building.request import BuildRequest, ParseRefused
from tnm_pipeline.export.errors import BuildFailed, ExportRejected


def main() -> None:
    """Answer the request on stdin; the last event is `"done"`, or says what was wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the asking process, which then ends this one
    channel = _Channel()
    request = _request(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_the_asker, args=(Path(request.plan),), daemon=True).start()
    try:
        trt = _import(request.builder)
        channel.send("version", trt.__version__)
        channel.send("done", asdict(build(trt, request, channel.send)))
    except ParseRefused as error:
        channel.send("unparsed", [asdict(complaint) for complaint in error.complaints])
    except ExportRejected as error:
        channel.send("rejected", str(error))
    except NotImplementedError as error:
        channel.send("lacking", str(error))
    except BuildFailed as error:
        channel.send("failed", str(error))
    except OSError as error:
        channel.send("unwritable", [error.errno, error.strerror, error.filename])
    except Exception as error:  # whatever else it is ends the build, and the asking process tells the user
        channel.send("failed", f"{type(error).__name__}: {error}")
    os._exit(0)  # the libraries' own clean-up can crash; all that matters is said and written


class _Channel:
    """Where events go: what stdout was, while stdout itself now leads to stderr, for libraries that print."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "wb")
        self._lock = threading.Lock()
        os.dup2(2, 1)

    def send(self, *event: Any) -> None:
        line = json.dumps(event).encode() + b"\n"
        with self._lock:
            try:
                self._file.write(line)
                self._file.flush()
            except OSError:  # the asking process is gone, and no exception may unwind through the builder
                os._exit(1)


def _request(line: bytes) -> BuildRequest:
    return BuildRequest(**json.loads(line))


def _end_with_the_asker(plan: Path) -> None:
    sys.stdin.buffer.read()
    plan.unlink(missing_ok=True)
    os._exit(1)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise NotImplementedError(
            f"{name} is installed and does not load: {error}; "
            f"run `pip install --force-reinstall {name.replace('_', '-')}`"
        ) from error


if __name__ == "__main__":
    main()
