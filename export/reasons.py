"""Why a sparse engine is not faster: one closed set of reasons, each with a stable key, what it says, and a way out.

`docs/not-faster.md` is the decision tree whose leaves these are. A message in braces is filled with what was found.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

TENSOR_CORES = "8.0"  # compute capability from which on tensor cores take 2:4
WIDE = 256  # NVIDIA's staff: C and K from which on sparse tactics win


@dataclass(frozen=True)
class Finding:
    """One reason, found.

    Attributes:
        key: Of `REASONS`; scripts may rely on it.
        message: What is the case.
        remedy: What to do about it.
    """

    key: str
    message: str
    remedy: str

    def __str__(self) -> str:
        """One line for a person."""
        return f"{self.message}: {self.remedy} [{self.key}]"


_PRUNE = "train or convert it with `tnm-pipeline`"
_NOTHING_TO_GAIN = "leave it dense; a large layer beside it decides about the speed"

# What the weight itself rules out, as the ONNX file shows it.
_OF_WEIGHTS = {
    "not-pruned": ("{kept:.1%} of its weights are not zero, so nothing was pruned", _PRUNE),
    "breaks-pattern": (
        "2:4 is broken in {broken} of {groups} groups along the input features",
        "a single group is enough to rule it out: repair the zeros by `tnm-pipeline convert`",
    ),
    "wrong-axis": (
        "2:4 holds along the output features, and TensorRT reads groups along the input features",
        "prune along dim 1 of the torch weight, or with 2:4-T, which holds along both",
    ),
    "wrong-axis-convolution": (
        "2:4 holds for weights that follow each other in memory, and TensorRT reads groups along the input channels",
        "prune along dim 1 of the torch weight, not its flattened rows",
    ),
    "other-pattern": ("it holds {pattern}, and TensorRT accelerates 2:4 only", "train or convert it to 2:4"),
    "length-not-multiple": (
        "it has {length} input features, no multiple of 4, and the last group would be short",
        "pad the features to a multiple of 4 in the model, and better of 16",
    ),
    "stem": ("a convolution over {channels} input channels has no whole group of 4", _NOTHING_TO_GAIN),
    "grouped-convolution": (
        "a convolution in {groups} groups, and sparse tactics are for one group",
        _NOTHING_TO_GAIN,
    ),
    "transposed-convolution": ("a transposed convolution, which NVIDIA does not list for 2:4", _NOTHING_TO_GAIN),
    "left-operand": (
        "the weight is the left operand of the product, and only the right one is taken for a weight",
        "write x @ w instead of w @ x, transposing both",
    ),
    "vector": ("the weight is a vector", _NOTHING_TO_GAIN),
    "computed-weight": (
        "the weight cannot be read: {why}",
        "export it as an initializer: fold constants, and call no operator on weights in forward()",
    ),
}

# What is known about the plan, or was seen while it was built.
_OF_PLANS = {
    "no-plan": ("no plan was built, so there is no tactic", "build one: `tnm-pipeline export --trt`"),
    "flag-off": ("the plan was built without SPARSE_WEIGHTS", "build it with the flag: `tnm-pipeline export --trt`"),
    "gpu-too-old": (
        "built for compute capability {capabilities}, and tensor cores take 2:4 from 8.0 on",
        "use a GPU of the Ampere generation or later",
    ),
    "rtx-silent": (
        "TensorRT for RTX chooses tactics where the plan is loaded, and says nothing about them",
        "measure both twins on that GPU: `tnm-pipeline bench`; to see tactics, build with trt.backend = tensorrt",
    ),
    "builder-silent": (
        "the builder's log does not say which tactics are sparse",
        "build on a GPU with `tnm-pipeline export --trt`, which reads the detailed log",
    ),
    "fused-away": (
        "no layer of the plan carries this node's name: it was fused, folded or renamed",
        "see what the builder's names were matched to in the report; `unmapped` lists the rest",
    ),
    "fused-region": (
        "the builder compiled it with others into {region}, whose single tactic hides theirs",
        "compare the twins' latency; the engine inspector may show more",
    ),
    "builder-disagrees": (
        "its weights hold 2:4 in whole groups, and the builder did not call it eligible",
        "keep the log for a bug report: something between file and builder changed the weight or its use",
    ),
    "dense-tactic": (
        "the builder took {tactic}, as it does where a dense one was faster",
        "nothing is wrong: choosing is what the builder is for. Larger layers and batches favour sparse tactics",
    ),
}

# Documented circumstances in which dense tactics tend to win. They are likely causes, never observations.
_RISKS = {
    "small-layer": (
        f"a matrix of {{outputs}} x {{inputs}}, and NVIDIA saw sparse tactics win from {WIDE} x {WIDE} on",
        _NOTHING_TO_GAIN,
    ),
    "not-aligned": (
        "{inputs} input and {outputs} output channels are not both multiples of {alignment}, as sparse math wants",
        "choose widths that are, or let the builder pad",
    ),
    "quantised": (
        "Q/DQ nodes surround it: a dense tactic is often taken unless its output is INT8 too",
        "quantise the outputs as well, or compare with the same network in fp16",
    ),
    "precision-fp32": (
        "it computes in fp32, where tensor cores take 2:4 only as TF32",
        "build from fp16 or bf16: trt.precision = fp16",
    ),
}

# What a measurement, or the want of one, says about the whole engine.
_OF_ENGINES = {
    "wrong-runtime": (
        "{runtime} multiplies by the zeros: 2:4 changes nothing there",
        "run a TensorRT plan on a GPU; ONNX Runtime on CPU or CUDA has no product that skips them",
    ),
    "twins-differ": (
        "the two differ in more than sparsity: {fields}",
        "make both in one run: `tnm-pipeline export --trt` writes and builds the dense twin with the same settings",
    ),
    "not-measured": ("nothing was timed: {why}", "run `tnm-pipeline bench` where the engine will run"),
    "gpu-throttled": (
        "the GPU slowed itself down while it was timed: {why}",
        "cool it, or lock its clocks (`nvidia-smi -lgc`), and measure again",
    ),
    "gpu-shared": ("other work ran on the GPU while it was timed: {why}", "stop it, and measure again"),
    "spread-too-wide": (
        "the times vary too much to tell the twins apart: {why}",
        "measure on an idle machine, with more rounds",
    ),
    "launch-bound": (
        "{factor:.3g} times the batch takes only {ratio:.3g} times as long, so arithmetic is not what takes the time",
        "sparse tactics save arithmetic: use larger batches, CUDA graphs or a larger model, or stay dense",
    ),
    "no-difference": (
        "the sparse engine takes {ratio:.3f} of the dense one's time, and the interval {low:.3f} to {high:.3f} holds 1",
        "keep the dense one if it is more accurate; try larger batches and layers",
    ),
    "dense-faster": (
        "the dense engine is faster: the sparse one takes {ratio:.3f} of its time ({low:.3f} to {high:.3f})",
        "keep the dense one; it is not worth it here",
    ),
}

REASONS: Mapping[str, tuple[str, str]] = MappingProxyType({**_OF_WEIGHTS, **_OF_PLANS, **_RISKS, **_OF_ENGINES})
"""Key -> message, remedy."""


def finding(key: str, **facts: object) -> Finding:
    """Fill in a reason.

    Args:
        key: Of `REASONS`.
        facts: What its message names in braces, no more and no less.

    Returns:
        The finding.
    """
    message, remedy = REASONS[key]
    return Finding(key, message.format(**facts), remedy)
