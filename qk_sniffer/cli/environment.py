"""Reads the file `.env`, which holds tokens and other variables for the processes of a run."""

from pathlib import Path

from dotenv import load_dotenv

from qk_sniffer.errors import ConfigError


def read_environment() -> None:
    """Sets the variables of `.env` in the current directory, except those that are set already.

    Call this where a job runs, before the import of a library that reads them (`HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`).
    Do not call it where a job is submitted: SLURM would store them with the job.

    Raises:
        ConfigError: the file is not UTF-8 text.
    """
    try:
        load_dotenv(Path(".env"))
    except UnicodeDecodeError as error:
        raise ConfigError([f"{Path('.env').absolute()} is not UTF-8: {error.reason}"]) from None
