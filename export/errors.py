"""What can go wrong between a torch module and a plan. Every message ends with the next action."""


class ExportRejected(ValueError):
    """A model, or an ONNX file made from it, is not what the next step may be given."""


class AccuracyGateFailed(RuntimeError):
    """An artifact's outputs differ from its reference by more than the limit of its precision."""


class BuildFailed(RuntimeError):
    """A TensorRT builder or parser gave up; the message holds its last log lines."""


class BuildOutOfMemory(BuildFailed):
    """A build that ended for lack of memory, on the machine or on its GPU."""


class BuildSettingError(ValueError):
    """A setting of a build makes no sense, or its profiles do not fit the graph."""
