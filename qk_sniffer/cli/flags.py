"""Reads the flags of a program that Hydra composes, and answers those that only print."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from hydra import initialize_config_dir, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig

from qk_sniffer.cli import renamed_keys
from qk_sniffer.cli.application import CONFIG_MODULE, VERSION_BASE, Application
from qk_sniffer.cli.explain import explain
from qk_sniffer.cli.help_text import fitted
from qk_sniffer.cli.schema import unknown_flag, without_key
from qk_sniffer.errors import ConfigError
from qk_sniffer.text import say, say_text


def parse_flags(arguments: list[str], first_key: str | None = None) -> argparse.Namespace:
    """Parses a command line as Hydra does. Flags and settings may come in any order.

    Args:
        arguments: of this process.
        first_key: the key of the first setting, if its value may be given without a key.

    Raises:
        ConfigError: a flag is unknown, lacks its value, or runs a pickle.
    """
    if any(argument.partition("=")[0] == "--config" for argument in arguments):
        raise ConfigError([renamed_keys.CONFIG_FLAG])
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    args, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise ConfigError([unknown_flag(text) for text in unknown])
    if args.experimental_rerun:
        raise ConfigError([_RERUN])
    if first_key is not None and (place := without_key(args.overrides, first_key)) is not None:
        value = args.overrides[place]
        args.overrides[place] = sys.argv[sys.argv.index(value)] = f"{first_key}={quoted(value)}"  # Hydra reads both
    return args


def quoted(text: str) -> str:
    """Returns a text as a value that Hydra reads literally."""
    # OmegaConf halves the backslashes before an interpolation, and an odd one makes it literal.
    literal = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text)
    # Backslashes before a quote stand for themselves only if they are doubled.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), literal) + "'"


def _refuse(message: str) -> NoReturn:
    if message.startswith("argument --cfg/-c"):
        message = f"{message}. It shows the settings; {_OWN_SETTINGS}"
    raise ConfigError([message])


_OWN_SETTINGS = (
    "for a file of your own settings, FOLDER/experiment/mine.yaml, write --config-dir FOLDER +experiment=mine"
)


_RERUN = (
    "--experimental-rerun: no such flag here, because it runs what a pickle holds; give the settings of the job again, "
    "which are in overrides.yaml in its folder"
)


def only_prints(args: argparse.Namespace) -> bool:
    """Whether Hydra itself answers the flags, such as `--help`, and runs no checked job."""
    flags = ("help", "hydra_help", "cfg", "info", "shell_completion")
    return any(getattr(args, flag) for flag in flags)


def show(
    application: Application[Any], task: Callable[[Any], Any], args: argparse.Namespace, check: Callable[[], object]
) -> int:
    """Has Hydra answer such flags, of the config as a job has it; returns the exit code.

    Args:
        application: the program.
        task: what the program does in a job.
        args: the command line.
        check: raises a ConfigError with the problems of the settings. It is called if Hydra cannot compose them.

    Raises:
        ConfigError: the settings have problems.
    """
    if isinstance(sys.stdout, TextIOWrapper):  # Hydra prints any value with `print`
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.argv[1:] = _flags_first(sys.argv[1:], args.overrides)
    said, help_text = StringIO(), StringIO()
    try:
        with (
            _composes_prepared(application.prepare),
            redirect_stderr(said),
            redirect_stdout(help_text) if args.help else nullcontext(),
        ):
            application.run_hydra(task)
    except BrokenPipeError:
        raise
    except Exception as error:  # for most of these flags Hydra does not handle errors
        say(explain(error, application.schema), to=sys.stderr)
        return 2
    except SystemExit as error:
        if error.code:
            check()
            say_text(said.getvalue().strip(), to=sys.stderr)
            return 2
    if args.help:
        say_text(fitted(help_text.getvalue().rstrip()))
    if text := said.getvalue().strip():
        say_text(text, to=sys.stderr)
    return 0


def _flags_first(arguments: list[str], settings: list[str]) -> list[str]:
    """Returns the arguments in the order that Hydra reads: it takes no setting after a flag that follows settings."""
    flags = arguments[::-1]
    for setting in reversed(settings):
        flags.remove(setting)
    return [*flags[::-1], *settings]


@contextmanager
def _composes_prepared(prepare: Callable[[DictConfig], None]) -> Iterator[None]:
    """Has Hydra print a config whose values that others refer to are derived: it prints before a task begins.

    For `--help`, it also lists the choices of groups from one copy of its sources. Hydra copies all of them for each
    folder, which takes most of the time.
    """
    compose, options_of = Hydra.compose_config, ConfigLoaderImpl.get_group_options
    copies: dict[Any, CachingConfigRepository] = {}

    def listed(
        self: ConfigLoaderImpl,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
        config_name: str | None = None,
        overrides: list[str] | None = None,
    ) -> list[str]:
        key = config_name, *(overrides or ())
        if key not in copies:
            copies[key] = self._parse_overrides_and_create_caching_repo(config_name, overrides or [])[1]
        return copies[key].get_group_options(group_name, results_filter)

    def composed(self: Hydra, *args: Any, **options: Any) -> DictConfig:
        node = compose(self, *args, **options)
        prepare(node)
        return node

    Hydra.compose_config, ConfigLoaderImpl.get_group_options = composed, listed  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.compose_config, ConfigLoaderImpl.get_group_options = compose, options_of  # type: ignore[method-assign]


@contextmanager
def initialized(args: argparse.Namespace) -> Iterator[ConfigLoader]:
    """Initializes Hydra with the config folders that the flags name; the value is its loader.

    Raises:
        ConfigError: a flag does not name a folder.
    """
    if args.config_dir is not None and not Path(args.config_dir).is_dir():
        raise ConfigError(
            [f"--config-dir {args.config_dir}: there is no such folder (the current folder is {Path.cwd()})"]
        )
    Plugins.instance().register(_ConfigDir)
    _ConfigDir.folder = None if args.config_dir is None else Path(args.config_dir).absolute()
    try:
        with _initialized(args.config_path):
            yield GlobalHydra.instance().config_loader()
    finally:
        _ConfigDir.folder = None


class _ConfigDir(SearchPathPlugin):
    """Adds the folder of `--config-dir` to Hydra's search path, which Hydra itself does only in `hydra.main`."""

    folder: ClassVar[Path | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder is not None:
            search_path.append("command-line", f"file://{self.folder}")


def _initialized(config_path: str | None) -> AbstractContextManager[None]:
    context: Any
    if config_path is None or config_path.startswith("pkg://"):
        module = CONFIG_MODULE if config_path is None else config_path.removeprefix("pkg://")
        context = initialize_config_module(module, version_base=VERSION_BASE)
    elif Path(config_path).is_absolute():
        context = initialize_config_dir(config_path, version_base=VERSION_BASE)
    else:
        raise ConfigError(
            [
                f"--config-path {config_path} replaces all groups and must be an absolute folder; "
                "to add groups of your own, use --config-dir"
            ]
        )
    return context  # type: ignore[no-any-return]
