"""Tests that a Hub other than huggingface.co is announced before anything is sent to it."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.fake_hub import FakeHub
from support.hub_cases import client, environment

from qk_sniffer import text
from qk_sniffer.errors import HubError, SourceError
from qk_sniffer.hub import endpoint
from qk_sniffer.hub.branch import Branch, find
from qk_sniffer.hub.client import reading_api, writing_api
from qk_sniffer.hub.endpoint import check_address
from qk_sniffer.logs import escape_libraries

pytestmark = pytest.mark.usefixtures("waits")


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_announced", set())
    monkeypatch.setattr(text, "_hidden", ())


@pytest.mark.parametrize(
    "address",
    ["https://huggingface.co", "https://huggingface.co/", "HTTPS://HuggingFace.co", "https://huggingface.co:443"],
)
def test_the_usual_hub_is_not_announced(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    reading_api()
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://hf-mirror.com", "go to https://hf-mirror.com instead of https://huggingface.co"),
        ("http://huggingface.co", "go to http://huggingface.co instead"),
        ("https://huggingface.co:8443", "huggingface.co:8443"),
        ("https://huggingface.co.evil.com", "huggingface.co.evil.com"),
        ("https://huggingface.co/evil", "go to https://huggingface.co/*** instead"),
        ("https://huggingface.co@evil.com", "go to https://***@evil.com"),
        ("https://me:pass@word@hub.lab", "go to https://***@hub.lab"),
        ("https://huggingface.co\u202e", r"https://huggingface.co\u202e"),
        ("https://hugging\u0430face.co", "https://hugging"),
        ("https://[::1]:8080/a", "go to https://[::1]:8080/*** instead"),
    ],
)
def test_any_other_is_announced_once(
    address: str, shown: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    reading_api()
    writing_api()
    (message,) = caplog.messages
    assert message.startswith("HF_ENDPOINT is set: what this process asks of the Hub, and the login's token, go to ")
    assert shown in message and "pass" not in message
    assert message.endswith("not encrypted") == (not address.startswith("https:"))


NO_ADDRESSES = [
    "http://user:SEC/RET@127.0.0.1:9",
    "https://user:SEC#RET@127.0.0.1:9",
    "https://user:SEC?RET@127.0.0.1:9",
    "user:SECRET@127.0.0.1:9",
    "user:SECRET",
    "http://127.0.0.1:SECRET",
    "http://127.0.0.1:9/?token=SECRET",
    "http://user:SECRET@[127.0.0.1",
    "foo://SECRET",
    "https://SEC RET",
    "SECRET.co\n",
    "https://user:[SECRET]@127.0.0.1:9",
    "https://user:SECRET@hos\u2100t",
]


@pytest.mark.parametrize("address", NO_ADDRESSES)
@pytest.mark.parametrize("name", ["HF_ENDPOINT", "HTTPS_PROXY"])
def test_what_is_no_address_is_refused_unseen(name: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries quote the part of a password that they take for a port."""
    monkeypatch.setenv(name, address)
    if name == "HF_ENDPOINT":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    with pytest.raises(SourceError, match=f"environment variable {name} is not an address") as refused:
        reading_api()
    assert not {"SEC", "RET"} & set(re.findall("SEC|RET", str(refused.value)))


@pytest.mark.parametrize(
    "address",
    ["http://proxy:3128", "http://me:a-word@proxy.lab:3128/", "proxy:3128", "proxy", "socks5h://me:a-word@[::1]:9", ""],
)
def test_logins_of_proxies_are_hidden(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", address)
    check_address()
    assert "a-word" not in text.printable(f"cannot reach {address}"), "also in a job that never asks the Hub"
    reading_api()
    assert "a-word" not in text.printable(f"cannot reach {address}")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("HF_HUB_DOWNLOAD_TIMEOUT", "a whole number of seconds"),
        ("HF_HUB_ETAG_TIMEOUT", "a whole number of seconds"),
        ("HF_DATASETS_IN_MEMORY_MAX_SIZE", "a number of bytes"),
    ],
)
@pytest.mark.parametrize("value", ["", "soon", "1.5s"])
def test_a_number_that_a_library_cannot_read_is_refused_before_its_import(
    name: str, what: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "30")
    check_address()
    monkeypatch.setenv(name, value)
    with pytest.raises(SourceError, match=f"the value of {name} in the environment is not {what}"):
        check_address()


def test_offline_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hf-mirror.com")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reading_api()
    assert caplog.messages == []


def test_before_the_first_request(endpoint: str, hub: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    requests_at: list[int] = []
    caplog.handler.addFilter(lambda record: requests_at.append(len(hub.log)) or True)
    find("alice/vectors", "main")
    assert requests_at[0] == 0 and f"go to {endpoint} instead" in caplog.messages[0]
    assert len(hub.log) > 0


def test_a_notebook_shows_it(hub: FakeHub, tmp_path: Path) -> None:
    """It has no handler of logs."""
    done = client(hub, tmp_path, "-c", "import qk_sniffer; qk_sniffer.open_dataset('alice/none')")
    assert "there is no dataset repository alice/none" in done.stderr
    assert done.stderr.count(f"go to {hub.url} instead of https://huggingface.co. That connection is not") == 1


def test_no_message_shows_the_signature_of_a_download(
    endpoint: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The Hub sends a client to another host for a large file. Whoever has that address can fetch the file."""
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    escape_libraries()
    commit = hub.commit("alice/some", {"manifest.json": b"{}"})
    signed = f"{hub.url.replace('127.0.0.1', 'localhost')}/signed/file?Expires=1&Signature=a-signature"
    facts = {"Location": signed, "ETag": '"abc"', "X_Repo_Commit": commit, "X_Linked_Size": "2"}
    hub.fault("HEAD", "/resolve/", status=302, times=99, **facts)
    hub.fault("GET", "/signed/", "drop", times=99)
    with pytest.raises(HubError) as raised:
        Branch("alice/some", "main", commit).path("manifest.json")
    said = f"{raised.value}\n{caplog.text}"
    assert "/signed/file?***" in said and "a-signature" not in said


@pytest.mark.slow
def test_no_message_shows_the_login(hub: FakeHub, tmp_path: Path) -> None:
    """Libraries quote an address with its password, and a token that no header can hold."""
    password = hub.url.replace("//", "//me:a-password@")
    ask = (
        "import logging, sys\n"
        "from qk_sniffer.errors import QkSnifferError\n"
        "from qk_sniffer.logs import logger\n"
        "from qk_sniffer.hub.branch import Branch, branch_url, open_branch\n"
        "from qk_sniffer.hub.revisions import hub_commit, hub_file\n"
        "logging.basicConfig()\n"
        "asked = 0\n"
        "for call, *args in ((hub_commit, 'model', 'a/b'), (hub_file, 'a/b', 'c'), (open_branch, 'a/b', None)):\n"
        "    try:\n"
        "        call(*args)\n"
        "    except QkSnifferError as error:\n"
        "        asked += 1\n"
        "        print(error)\n"
        "        logger('qk_sniffer.test').error('', exc_info=True)\n"
        "print(Branch('a/b', 'c', '1' * 40).url)\n"
        "sys.exit(asked != 3)\n"
    )
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_bytes(b"hf_a-secret\0token")
    env = environment(hub, tmp_path, token=None)
    for address in (hub.url, password, f"{hub.url}/a-secret-path"):
        done = subprocess.run(
            [sys.executable, "-c", ask], env=env | {"HF_ENDPOINT": address}, capture_output=True, text=True
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        assert "password" not in said and "secret" not in said
        path = "/***" if "path" in address else ""
        assert "***" in said and f"{hub.url}{path}/datasets/a/b/tree/c" in done.stdout


PROGRAMS = {
    "cli.app": ("model=hf", "model.name=org/m"),
    "plasticity.cli": ("data_root=org/m",),
    "export.cli": ("data_root=org/m", "format=qfilters"),
    "verify": ("data_root=.",),
    "finalize": ("data_root=.",),
    "heads": ("data_root=org/m",),
    "pictures": ("data_root=org/m",),
    "status": (".",),
}


def test_every_program_checks_the_address_before_a_library_reads_it(tmp_path: Path) -> None:
    """huggingface_hub takes it apart when it is imported, and Python quotes what it takes for a host."""
    programs = (
        "import importlib, sys\n"
        f"for name, arguments in {PROGRAMS!r}.items():\n"
        "    sys.argv = [name, *arguments]\n"
        "    assert importlib.import_module(f'qk_sniffer.{name}').main() == 1, name\n"
        "import qk_sniffer\n"
        "from qk_sniffer.errors import SourceError\n"
        "calls = (lambda: qk_sniffer.open_dataset('org/m'), lambda: importlib.import_module('qk_sniffer.families'))\n"
        "for call in calls:\n"
        "    try:\n"
        "        call()\n"
        "    except SourceError as error:\n"
        "        print(error, file=sys.stderr)\n"
        "assert 'huggingface_hub' not in sys.modules\n"
    )
    env = os.environ | {"HF_ENDPOINT": "https://user:[SECRET]@host"}
    done = subprocess.run([sys.executable, "-c", programs], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "SECRET" not in done.stdout + done.stderr, done.stderr
    assert done.stderr.count("variable HF_ENDPOINT is not an address") == len(PROGRAMS) + 2
