"""What can go wrong between an artifact on disk and an answer. Every message ends with the next action."""


class ArtifactRejected(ValueError):
    """A file is missing, corrupt, edited, has the wrong hash, or is not what its manifest says.

    Never masked by a fallback: a file that changed since it was written is not a missing GPU.
    """


class EnvironmentLacks(RuntimeError):
    """This machine has no driver, GPU, runtime library or provider that the artifact needs."""


class DeviceOutOfMemory(MemoryError):
    """The GPU has too little free memory; a smaller batch may fit."""


class FeedError(ValueError):
    """An array given to `Session.run` has the wrong name, dtype, rank or size."""


class SessionClosed(RuntimeError):
    """`Session.run` was called after `Session.close`."""
