"""How results reach stdout."""

import json
import sys
from typing import Any


def print_json(value: Any) -> None:
    """Print a JSON-able value for machines."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
