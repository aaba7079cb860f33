"""Reads the JSON files of a checkpoint, and says what is wrong with a damaged one."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class DamagedFileError(ValueError):
    """A file of a checkpoint is damaged. The message says how, without the name of the file."""


def json_object(content: bytes) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
        DamagedFileError: it holds none.
    """
    try:
        found = json.loads(content.decode())
    except UnicodeDecodeError:
        raise DamagedFileError("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise DamagedFileError(f"it is not JSON ({error.msg} in line {error.lineno})") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, or lists too deep
        raise DamagedFileError(f"it is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise DamagedFileError(f"it holds {type(found).__name__}, not an object")
    return found


def damaged_json(files: Iterable[Path]) -> str | None:
    """Returns the name of the first file that holds no JSON object, with the reason; None if each readable one does."""
    for file in files:
        try:
            json_object(file.read_bytes())
        except OSError:
            continue
        except DamagedFileError as error:
            return f"{file.name} is damaged: {error}"
    return None
