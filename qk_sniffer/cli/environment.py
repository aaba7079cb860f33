"""The file `.env`: tokens and the like for the processes of a run, wherever they are started."""

from pathlib import Path

from dotenv import load_dotenv

from qk_sniffer.errors import ConfigError


def read_environment() -> None:
    """Sets the variables that `.env` in the current directory names, but those that are set already.

    To be called where a job runs, before a library is imported that reads them (`HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`);
    not where it is submitted, or SLURM would keep them with the job.

    Raises:
        ConfigError: the file is not text.
    """
    try:
        load_dotenv(Path(".env"))
    except UnicodeDecodeError as error:
        raise ConfigError([f"{Path('.env').absolute()} is not UTF-8: {error.reason}"]) from None
