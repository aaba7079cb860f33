"""Tests what the file `.env` of the current folder may set, and what it may look like."""

import errno
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hostile import far_link

from qk_sniffer.cli import environment
from qk_sniffer.cli.environment import ALLOWED, PROXIES, read_environment
from qk_sniffer.config import DatasetConfig
from qk_sniffer.corpus.sources import open_source
from qk_sniffer.errors import ConfigError, SourceError
from qk_sniffer.hub import endpoint

Read = Callable[[str], dict[str, str]]


@pytest.fixture(autouse=True)
def bare_process(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder and a process that has no variable of interest and has logged nothing. Restores its variables."""
    before = dict(os.environ)
    for name in [*ALLOWED, "HF_ENDPOINT"]:
        os.environ.pop(name, None)
    monkeypatch.setattr(environment, "_told", set())
    monkeypatch.setattr(endpoint, "_of_env", set())
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def read(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Writes `.env`, reads it, and returns the variables that it has set."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(in_tmp / "compiled"))

    def written_and_read(text: str) -> dict[str, str]:
        (in_tmp / ".env").write_text(text, encoding="utf-8")
        before = dict(os.environ)
        read_environment()
        return {name: value for name, value in os.environ.items() if before.get(name) != value}

    return written_and_read


def test_every_allowed_name_is_obeyed_and_documented(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    values = {name: "30" if name.endswith("_TIMEOUT") else f"some {name}" for name in ALLOWED}
    set_all = read("".join(f"{name}={value}\n" for name, value in values.items()))
    assert set_all == {name: value for name, value in values.items() if name != "HF_HOME"}, "the caches have names"
    assert caplog.messages == []
    page = (Path(__file__).parents[2] / "SECURITY.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| variables of `\.env` .*?\n\n", page, flags=re.MULTILINE | re.DOTALL)
    rows = table.strip().splitlines()[2:]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named | {name.upper() for name in named & PROXIES} == ALLOWED


# Variables by which a folder of someone else could run code, read the login or send it elsewhere.
HARMFUL = re.findall(
    r"\S+",
    """
    BASH_ENV CURL_CA_BUNDLE GCONV_PATH GIT_SSH_COMMAND HF_ENDPOINT HF_HUB_ENDPOINT HF_INFERENCE_ENDPOINT
    HF_MODULES_CACHE HF_OIDC_RESOURCE HF_STORED_TOKENS_PATH HF_TOKEN_PATH HF_XET_CLIENT_UNIX_SOCKET_PATH
    HF_XET_DATA_DEFAULT_CAS_ENDPOINT HF_XET_LOG_DEST HOME HUGGINGFACE_CO_STAGING LD_LIBRARY_PATH LD_PRELOAD NETRC PATH
    PYTHONBREAKPOINT PYTHONHOME PYTHONINSPECT PYTHONPATH PYTHONSTARTUP PYTHONWARNINGS REQUESTS_CA_BUNDLE SBATCH_EXPORT
    SLURM_CONF SSL_CERT_DIR SSL_CERT_FILE TMPDIR TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR XDG_CACHE_HOME hf_token
    """,
)


@pytest.mark.parametrize("name", HARMFUL)
def test_another_name_is_ignored_and_named_once(
    name: str, read: Read, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name, raising=False)
    assert read(f"{name}=the-value\n").keys() <= {"TORCHINDUCTOR_CACHE_DIR"}  # which this process sets itself
    assert os.environ.get(name) != "the-value"
    read_environment()
    (message,) = caplog.messages
    assert f"{name} ignored" in message and "SECURITY.md" in message and "Set others in the environment" in message
    assert "the-value" not in message and caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize("line", ["QWZSECRETCOOKIEABCDE", "0123abcdef", "secretword"])
def test_a_line_without_a_value_is_no_name(line: str, read: Read, caplog: pytest.LogCaptureFixture) -> None:
    assert read(f"{line}\n") == {}
    assert caplog.messages and line not in caplog.text, ".env may be a link to another file"


def test_a_name_that_is_set_already_is_neither_changed_nor_reported(
    read: Read, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mine")
    monkeypatch.setenv("HTTPS_PROXY", "http://mine")  # one of two spellings, of which the other one would count
    monkeypatch.setenv("HF_HOME", "")
    assert read("HF_ENDPOINT=x\nhttps_proxy=http://theirs\nHF_HOME=theirs\nHF_TOKEN=theirs\n") == {"HF_TOKEN": "theirs"}
    assert caplog.messages == []


def test_many_names_take_one_line(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    read("".join(f"OTHER_{number}=x\n" for number in range(2000)) + "'A\x1b[31m\u202eB'=1\n")
    (message,) = caplog.messages
    assert "OTHER_9 and 1,990 more and 1 other line ignored" in message and len(message) < 500


def test_lines_that_may_be_a_key_are_not_shown(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    lines = ["-----BEGIN KEY-----", "b3BlbnNzaC1rZXktdjEAAAAABG5vbmU", "AAAEbm9uZQAAAAAAAAAB==", "LD_PRELOAD=x"]
    read("\n".join(lines) + "\n")
    assert "LD_PRELOAD and 2 other lines ignored" in caplog.messages[-1]
    assert "b3Blb" not in caplog.text and "AAAE" not in caplog.text


@pytest.mark.parametrize("endpoint", ["http://hub.lab:8080", "HTTP://x"])
def test_a_proxy_is_refused_if_the_login_would_reach_it_unencrypted(
    endpoint: str, read: Read, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert read("http_proxy=http://evil\nALL_PROXY=http://evil\nHF_TOKEN=mine\n") == {"HF_TOKEN": "mine"}
    assert "http_proxy, ALL_PROXY ignored" in caplog.text and "no proxy while HF_ENDPOINT is not https" in caplog.text


@pytest.mark.parametrize(
    ("address", "is_refused"),
    [
        ("http://alice:s3cret@data.lab/a.jsonl", True),
        ("HTTP://data.lab/a.jsonl", True),
        ("zip://*.csv::http://data.lab/a.zip", True),
        ("simplecache::webhdfs://data.lab/a.csv", True),
        ("http:/data.lab/a.jsonl", True),
        ("https://data.lab/a.jsonl", False),
        ("gzip://a.csv::hf://datasets/org/name/a.csv.gz", False),
        ("a.jsonl", False),
    ],
)
def test_no_proxy_reads_the_login_of_an_address(
    address: str, is_refused: bool, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://mine")
    read("NO_PROXY=x\nhttps_proxy=http://evil\n")
    endpoint.refuse_open_address(address)  # the proxy is the user's own
    read("all_proxy=http://evil\nHTTP_PROXY=http://evil\n")
    words = "sets HTTP_PROXY, all_proxy" if is_refused else "data_files=.* does not apply"
    with pytest.raises(SourceError, match=words):
        open_source(DatasetConfig(path="pydoc", data_files={"train": [address]}))


def test_an_address_of_the_hub_that_is_none_ends_a_job_before_a_library_reads_it(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://user:[s3cret]@hub.lab")
    with pytest.raises(SourceError, match="HF_ENDPOINT is not an address") as refused:
        read("HF_TOKEN=mine\n")
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("value", ["${SECRET}", "$SECRET", "x${SECRET:-y}", "'${SECRET}'"])
def test_values_never_take_in_other_variables(value: str, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy's name or a folder's would carry a secret of the environment outside."""
    monkeypatch.setenv("SECRET", "s3cret")
    for name in ("HF_HOME", "https_proxy"):
        with pytest.raises(
            ConfigError, match=rf"\.env: the value of {name} has a dollar sign.*set {name} in the env"
        ) as e:
            read(f"{name}={value}\n")
        assert "s3cret" not in str(e.value) and value not in str(e.value) and name not in os.environ


@pytest.mark.parametrize("value", ["abc", "1e999", "-1", "", "9" * 5000])
def test_seconds_that_the_library_of_the_hub_cannot_read(value: str, read: Read) -> None:
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        with pytest.raises(ConfigError, match=rf"\.env: the value of {name} is not a whole number of seconds"):
            read(f"{name}={value}\n")
    assert read("HF_HUB_ETAG_TIMEOUT=30\n") == {"HF_HUB_ETAG_TIMEOUT": "30"}


def test_values_that_no_variable_can_have(read: Read) -> None:
    with pytest.raises(ConfigError, match="the value of HF_TOKEN has a zero byte"):
        read("HF_TOKEN=a\0b\n")
    assert read("HF_TOKEN\nHF_HOME=\n\n# words\nexport HF_HUB_OFFLINE='1'\n\ufeff= =\n") == {
        "HF_TOKEN": "",
        "HF_HUB_OFFLINE": "1",
    }


def caches_in(home: str) -> dict[str, str]:
    names = {"HF_HUB_CACHE": "hub", "HF_XET_CACHE": "xet", "HF_DATASETS_CACHE": "datasets"}
    return {name: f"{home}/{folder}" for name, folder in names.items()}


def test_home_is_the_folder_of_downloads_alone(
    read: Read, in_tmp: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read("HF_HOME=home\n") == caches_in("home")
    assert read("HF_HOME=home\n") == {}, "the same job again, in one process"
    for name in caches_in("home"):
        del os.environ[name]
    assert caplog.messages == []
    (in_tmp / "home").mkdir()
    (in_tmp / "home" / "token").symlink_to("/nowhere")
    assert read("HF_HOME=home\nHF_HUB_CACHE=mine\n") == caches_in("home") | {"HF_HUB_CACHE": "mine"}
    (message,) = caplog.messages
    assert "HF_HOME sets the folders of downloads alone" in message and "Set HF_TOKEN in the file" in message
    for name in caches_in("home"):
        del os.environ[name]
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", "mine")
    assert "HF_HUB_CACHE" not in read("HF_HOME=home\nHF_TOKEN=hf_mine\n")


@pytest.mark.parametrize("kind", ["folder", "file", "nothing", "pipe"])
@pytest.mark.parametrize("place", ["hub/models--org--m", "datasets/qk_sniffer/1", "xet/staging"])
def test_a_cache_that_leads_elsewhere(place: str, kind: str, read: Read, in_tmp: Path) -> None:
    """Libraries read files of the user through links there, as texts or templates, and write through them."""
    mine, entry = in_tmp / "mine", in_tmp / "home" / place
    entry.parent.mkdir(parents=True)
    if kind == "folder":
        mine.mkdir()
    elif kind == "file":
        mine.write_text("s3cret")
    if kind != "pipe":
        entry.symlink_to(mine)
    else:
        os.mkfifo(entry)
    with pytest.raises(ConfigError, match=rf"names home/\w+, and home/{place} is a link to elsewhere, or no file: rem"):
        read("HF_HOME=home\n")
    assert os.environ.keys().isdisjoint(caches_in("home"))


def test_a_cache_that_leads_elsewhere_over_a_path_that_is_too_long(read: Read, in_tmp: Path) -> None:
    """`os.path.realpath` sees no link there, and libraries read the file that it leads to."""
    (in_tmp / "mine").write_text("s3cret")
    hub = in_tmp / "home" / "hub"
    hub.mkdir(parents=True)
    (hub / "config.json").symlink_to(far_link(hub, in_tmp / "mine"))
    assert (hub / "config.json").read_text() == "s3cret"
    with pytest.raises(ConfigError, match="is a link to elsewhere"):
        read("HF_HOME=home\n")


def test_a_cache_with_a_folder_that_cannot_be_listed(read: Read, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries open its files by their names, links to elsewhere too."""
    closed = Path("home", "hub", "models--org--m")
    closed.mkdir(parents=True)
    listed = os.scandir

    def scandir(path: Any) -> Any:
        if path == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr("qk_sniffer.store.disk.os.scandir", scandir)
    with pytest.raises(ConfigError, match=f"{closed} cannot be listed: Permission denied: remove it"):
        read("HF_HOME=home\n")


def test_a_cache_that_is_a_link(read: Read, in_tmp: Path) -> None:
    (in_tmp / "mine").mkdir()
    (in_tmp / "home").symlink_to("mine")
    with pytest.raises(ConfigError, match="HF_HUB_CACHE names home, and home is a link to elsewhere"):
        read("HF_HUB_CACHE=home\n")


def test_a_cache_as_the_libraries_leave_it(read: Read, in_tmp: Path) -> None:
    model = in_tmp / "home" / "hub" / "models--org--m"
    for name in ("blobs", "snapshots/1", "refs"):
        (model / name).mkdir(parents=True)
    (model / "blobs" / "a").write_text("x")
    (model / "snapshots" / "1" / "config.json").symlink_to("../../blobs/a")
    (model / "snapshots" / "1" / "gone").symlink_to("../../blobs/gone")
    (model / "snapshots" / "1" / "circle").symlink_to("circle")
    assert read("HF_HOME=home\n") == caches_in("home")


def test_an_empty_folder_of_downloads_is_not_the_current_one(read: Read) -> None:
    assert read("HF_HUB_CACHE=\nHF_DATASETS_CACHE=''\nHF_XET_CACHE\n") == {}


def test_home_may_begin_with_a_tilde(read: Read) -> None:
    assert read("HF_HOME=~/.hf\n") == caches_in(f"{Path.home()}/.hf")
    with pytest.raises(ConfigError, match="of a user who does not exist"):
        read("HF_HOME=~nobody-of-this-name/x\n")


HOME = "import sys; from qk_sniffer.cli.environment import read_environment; read_environment()\n"


def test_no_file_in_home_is_read_as_a_login_or_written(in_tmp: Path) -> None:
    """huggingface_hub sends `token`, shows lines of `stored_tokens`, and overwrites files there, through links."""
    mine, home = in_tmp / "mine", in_tmp / "home"
    home.mkdir()
    mine.write_text("hf_s3cret = of:another:program\n")
    for name in ("token", "stored_tokens", "stored_tokens.lock", ".agent_harnesses.json"):
        (home / name).symlink_to(mine)
    (in_tmp / ".env").write_text("HF_HOME=home\n")
    looks = "import datasets, transformers, huggingface_hub as hub; from huggingface_hub import constants as c\n" + (
        "print(hub.get_token(), c.HF_HUB_CACHE, c.HF_XET_CACHE, datasets.config.HF_DATASETS_CACHE, c.HF_HOME)"
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", HOME + looks],
        env=variables | {"HOME": str(in_tmp / "user"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    of_user = in_tmp / "user" / ".cache" / "huggingface"
    assert done.stdout.split() == ["None", *caches_in("home").values(), str(of_user)]
    assert "s3cret" not in done.stderr and mine.read_text() == "hf_s3cret = of:another:program\n"


def test_a_mark_at_the_start_is_not_part_of_the_first_name(read: Read) -> None:
    assert read("\ufeffHF_TOKEN=mine\n") == {"HF_TOKEN": "mine"}


def test_what_is_not_a_file(in_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = in_tmp / ".env"
    read_environment()  # there is none
    path.mkdir()
    read_environment()  # a virtual environment
    assert caplog.messages == []
    path.rmdir()
    os.mkfifo(path)
    read_environment()
    path.unlink()
    path.symlink_to("/dev/zero")
    read_environment()
    assert all("is not a file, and is ignored" in message for message in caplog.messages)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(ConfigError, match=r"\.env cannot be read: .*Repair it, or move it away"):
        read_environment()


def test_a_link_to_a_file_is_followed(in_tmp: Path) -> None:
    (in_tmp / "mine").write_text("HF_TOKEN=mine\n")
    (in_tmp / ".env").symlink_to("mine")
    read_environment()
    assert os.environ["HF_TOKEN"] == "mine"
    (in_tmp / "mine").unlink()
    del os.environ["HF_TOKEN"]
    read_environment()
    assert "HF_TOKEN" not in os.environ


def test_sizes_and_bytes_that_no_list_of_variables_has(read: Read, in_tmp: Path) -> None:
    assert read("#" * 65_000 + "\nHF_TOKEN=mine\n") == {"HF_TOKEN": "mine"}
    with pytest.raises(ConfigError, match=r"\.env is larger than 65,536 bytes"):
        read("#" * 65_537)
    (in_tmp / ".env").write_bytes(b"HF_TOKEN=\xff\n")
    with pytest.raises(ConfigError, match=r"\.env is not UTF-8") as error:
        read_environment()
    assert "xff" not in str(error.value)
