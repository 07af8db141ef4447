"""Names that a manifest states of other files: the same file on every system, or refused.

A name that is harmless where it was written may be a device, another stream of a file or another folder elsewhere.
"""

import unicodedata

from tnm_pipeline.engines.decode import require

_SEPARATORS_AND_WILDCARDS = frozenset('<>:"/\\|?*')
# Microsoft, "Naming Files, Paths, and Namespaces": with any extension, and with superscript digits too.
_DEVICES = frozenset(
    [
        "CON",
        "PRN",
        "AUX",
        "NUL",
        "CONIN$",
        "CONOUT$",
        *(port + digit for port in ("COM", "LPT") for digit in "0123456789"),
    ]
)
_LONGEST_NAME, _LONGEST_PATH = 255, 1024  # bytes in UTF-8


def check_file_name(name: str, what: str) -> None:
    """Refuse what is not the name of a file in the same folder.

    Args:
        name: The name.
        what: Whose, for the complaint.

    Raises:
        ArtifactRejected: It is empty, too long, a path, a device of Windows, or has characters that are not printed,
            that Windows forbids, or that may be taken for such.
    """
    require(_portable(name), f"{what} must be a bare file name that every system accepts, not {name[:_LONGEST_NAME]!a}")


def check_relative_path(path: str, what: str) -> None:
    """Refuse what is not `..` any number of times and then names of `check_file_name`, with `/` between them.

    Args:
        path: The path.
        what: Whose, for the complaint.

    Raises:
        ArtifactRejected: It is not.
    """
    names = path.split("/")
    while names[0] == ".." and len(names) > 1:
        del names[0]
    require(
        all(map(_portable, names)) and len(path.encode()) <= _LONGEST_PATH,
        f"{what} must be a relative path with forward slashes, and names that every system accepts, "
        f"not {path[:_LONGEST_PATH]!a}",
    )


def _portable(name: str) -> bool:
    if not name.isprintable() or not 0 < len(name.encode()) <= _LONGEST_NAME:
        return False
    # Some systems fold look-alikes, such as the fullwidth solidus, into what they look like.
    return not any(map(_special, (name, unicodedata.normalize("NFKC", name))))


def _special(name: str) -> bool:
    stem = name.partition(".")[0].rstrip(" ").upper()
    return bool(_SEPARATORS_AND_WILDCARDS & set(name)) or name[-1] in ". " or stem in _DEVICES
