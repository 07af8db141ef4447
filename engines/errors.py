"""What can go wrong between an artifact on disk and an answer. Every message ends with the next action."""


class ArtifactRejected(ValueError):
    """A file is missing, corrupt, edited, has the wrong hash, or is not what its manifest says.

    Never masked by a fallback: a file that changed since it was written is not a missing GPU.
    """


class SignatureRejected(ArtifactRejected):
    """A signature was demanded, and there is none, or it is of another key or another manifest."""


class KeyRejected(ValueError):
    """A file or bytes given as a key are none for Ed25519, or a password does not open it."""


class EnvironmentLacks(RuntimeError):
    """This machine has no driver, GPU, runtime library or provider that the artifact needs."""


class DeviceOutOfMemory(MemoryError):
    """The GPU has too little free memory; a smaller batch may fit."""


class FeedError(ValueError):
    """An array given to a session has the wrong name, dtype, rank, size or, where that is checked, value."""


class RunFailed(RuntimeError):
    """The runtime failed on a call whose inputs are as the manifest states. The session goes on with the next one."""


class Overloaded(RuntimeError):
    """The queue is full, or no context was free for too long. Nothing was run: send it again later, or elsewhere."""


class DeadlineExceeded(TimeoutError):
    """The time that a call was given ran out. Its answer, if any, is dropped."""


class SessionClosed(RuntimeError):
    """A session was asked to answer after `close` or while it drains."""
