"""What a TensorRT builder said while it worked: it raises nothing, so its log is the only witness."""

import re
from dataclasses import dataclass, field

# TensorRT 10.x and later: "(Sparsity) Found 3 layer(s) eligible to use sparse tactics: a, b, c".
# Before: "(Sparsity) Layers eligible for sparse math: a, b, c", with nothing after the colon for none.
_COUNTED = {
    "eligible": re.compile(r"\(Sparsity\) Found (\d+) layer\(s\) eligible"),
    "picked": re.compile(r"\(Sparsity\) Chose (\d+) layer\(s\)"),
}
_LISTED = {
    "eligible": re.compile(r"\(Sparsity\) Layers eligible for sparse math:(.*)"),
    "picked": re.compile(r"\(Sparsity\) TRT inference plan picked sparse implementation for layers:(.*)"),
}
_TROUBLE = ("WARNING", "ERROR", "INTERNAL_ERROR")


@dataclass
class BuildLog:
    """Messages in the order they came, each with its severity's name (`"ERROR"`, `"VERBOSE"`, ...)."""

    messages: list[tuple[str, str]] = field(default_factory=list)

    def add(self, severity: str, text: str) -> None:
        """Append one message."""
        self.messages.append((severity, text))

    def trouble(self, count: int = 5) -> str:
        """The last `count` warnings and errors, or else the last messages of any kind, one per line."""
        bad = [text for severity, text in self.messages if severity in _TROUBLE]
        return "\n".join((bad or [text for _, text in self.messages])[-count:]) or "the builder logged nothing"

    @property
    def eligible_layers(self) -> int | None:
        """Layers that the builder called eligible for sparse tactics; None when it did not say."""
        return self._layers("eligible")

    @property
    def picked_layers(self) -> int | None:
        """Layers for which the builder chose a sparse tactic; None when it did not say."""
        return self._layers("picked")

    def _layers(self, kind: str) -> int | None:
        for _, text in reversed(self.messages):
            if counted := _COUNTED[kind].search(text):
                return int(counted[1])
            if listed := _LISTED[kind].search(text):
                return len([name for name in listed[1].split(",") if name.strip()])
        return None
