"""One check in a process of its own: python -m treepo.doctor.child MODULE:FUNCTION FILE

The outcome is written to the file. An error that a user can understand is a failed outcome; any other ends
the process, which is for the caller to see.
"""

import sys
from importlib import import_module
from pathlib import Path

import orjson

from treepo.doctor.outcome import as_document, failed
from treepo.errors import TreepoError


def main(place: str, answer: Path) -> None:
    module, function = place.split(":")
    try:
        outcome = getattr(import_module(module), function)()
    except TreepoError as error:
        outcome = failed(str(error), "")
    partial = answer.with_suffix(".partial")
    partial.write_bytes(orjson.dumps(as_document(outcome)))
    partial.replace(answer)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
