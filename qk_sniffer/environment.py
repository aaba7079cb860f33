"""The file `.env`: tokens and the like for the processes of a run, wherever they are started."""

from pathlib import Path

from dotenv import load_dotenv


def read_environment() -> None:
    """Sets the variables that `.env` in the current directory names, but those that are set already.

    To be called before a library is imported that reads them (`HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`).
    """
    load_dotenv(Path(".env"))
