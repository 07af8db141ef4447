import pytest

from tnm_pipeline.engines import ArtifactRejected
from tnm_pipeline.engines.filenames import check_file_name, check_relative_path

REFUSED = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/etc/passwd",
    "a\\b",
    "..\\x",
    "C:x",
    "C:\\x",
    "\\\\host\\share",
    "x:stream",  # another stream of the file x
    "a*",
    "a?",
    "<a>",
    "a|b",
    "x\0",
    "x\n",
    "\x1b[31mx",
    "x\u202eplan",  # writes the rest from right to left
    "x\u200b",  # a space without width
    "\ud800x",
    "x.",  # Windows drops dots and spaces at the end
    "x ",
    "CON",
    "nul.onnx",
    "com1.plan",
    "COM\u00b9.plan",
    "lpt9",
    "AUX .x",
    "CONIN$",
    "\uff0e\uff0e\uff0fx",  # fullwidth ../x
    "..\u2100",  # a/c in one character
    "a\uff3cb",  # fullwidth backslash
    "a" * 256,
    "\u00e9" * 128,  # 256 bytes
]
ACCEPTED = [
    "model.fp32.onnx",
    "model.onnx.data",
    ".hidden",
    "a b",
    "modèle.plan",
    "模型.onnx",
    "console",
    "com10",
    "a" * 255,
]


@pytest.mark.parametrize("name", REFUSED, ids=ascii)
def test_a_name_that_some_system_takes_for_something_else_is_refused(name: str) -> None:
    with pytest.raises(ArtifactRejected, match="artifact must be a bare file name"):
        check_file_name(name, "artifact")
    if name not in ("../x", "a/b"):
        for path in (name, f"../a/{name}"):
            with pytest.raises(ArtifactRejected, match="source_onnx must be a relative path"):
                check_relative_path(path, "source_onnx")


@pytest.mark.parametrize("name", ACCEPTED, ids=ascii)
def test_an_ordinary_name_is_accepted(name: str) -> None:
    check_file_name(name, "artifact")
    check_relative_path(name, "source_onnx")
    check_relative_path(f"../../{name}", "source_onnx")
    check_relative_path(f"../{name}/{name}", "source_onnx")


@pytest.mark.parametrize("path", ["..", "../..", "../", "a//b", "/a", "a/", "./a", "a/..", "../" * 340 + "model"])
def test_a_path_that_is_no_file_or_in_no_normal_form_is_refused(path: str) -> None:
    with pytest.raises(ArtifactRejected, match="must be a relative path"):
        check_relative_path(path, "source_onnx")
