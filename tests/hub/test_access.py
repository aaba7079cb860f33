"""Tests the access to the Hub: refusals on publishing, and the check before a job."""

import json
import logging
import socket
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from support.fake_hub import FakeHub
from support.hub_cases import BRANCH, REPO, MakeDataset, assert_published, publish

from qk_sniffer.errors import HubError, SourceError
from qk_sniffer.hub.client import require_access
from qk_sniffer.hub.revisions import current_commit

pytestmark = [pytest.mark.floor, pytest.mark.usefixtures("waits")]


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (True, REPO, r"there is no token: set HF_TOKEN, or .*hf auth login"),
        ("hf_mallory", REPO, "refuses the token"),
        ("hf_bob", REPO, "lacks the permission"),
        ("hf_alice", "alice/two--dashes", "Cannot have --"),
        ("hf_secret\ntoken", REPO, r"Illegal header value .*\*\*\*"),
    ],
)
def test_a_wrong_login_or_name_ends_at_once(
    token: str | bool,
    repo_id: str,
    message: str,
    hub: FakeHub,
    make_dataset: MakeDataset,
    tmp_path: Path,
    waits: list[float],
) -> None:
    with pytest.raises(HubError, match=message) as caught:
        publish(make_dataset(tmp_path / "a"), repo_id, BRANCH, api=HfApi(endpoint=hub.url, token=token))
    assert not isinstance(token, str) or (token not in str(caught.value) and "secret" not in str(caught.value))
    assert hub.repositories == {} and waits == []


def test_a_model_without_a_network_names_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    way_out = r"offline mode is on.*local cache\. Rerun the command where the Hub can be reached, or set model\.name to"
    with pytest.raises(SourceError, match=way_out):
        current_commit("org/model", "main")


def test_private(hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "a")
    publish(root, REPO, BRANCH, private=True, api=api)
    assert hub.repositories[REPO].private
    hub.create("alice/public")
    with pytest.raises(HubError, match=r"exists and is public.*settings.*stays whole"):
        publish(root, "alice/public", BRANCH, private=True, api=api)
    assert list(hub.repositories["alice/public"].branches) == ["main", BRANCH]
    assert hub.repositories["alice/public"].branches[BRANCH] == hub.repositories["alice/public"].branches["main"]


@pytest.mark.parametrize("answer", ["[]", "{}", '{"name": "alice", "orgs": [1]}', '{"name": "alice", "auth": "read"}'])
def test_an_answer_of_another_form_is_no_login(
    answer: str, hub: FakeHub, api: HfApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(HfApi, "whoami", lambda *_: json.loads(answer))
    require_access(REPO, api=api)
    assert "the login to the Hub could not be checked: ValidationError" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("POST", "/preupload/", "preupload_info is improperly formatted"),
        ("POST", "/commit/", "KeyError: 'commitUrl'"),
        ("GET", "/commits/", "ValueError: the Hub lists no commit of the branch"),
        ("GET", "/revision/", "could not be updated: KeyError"),
    ],
)
def test_answers_of_another_form_leave_the_dataset_whole(
    method: str, path: str, message: str, hub: FakeHub, api: HfApi, make_dataset: MakeDataset, tmp_path: Path
) -> None:
    """As of a network that asks for a login on a page of its own."""
    root = make_dataset(tmp_path / "a")
    hub.create(REPO)
    hub.fault(method, path, status=200, content=b"[]" if path == "/commits/" else b"{}")
    with pytest.raises(HubError, match=rf"{message}.*rerun the command of its job|{message}.*Rerun the command"):
        publish(root, REPO, BRANCH, api=api)
    publish(root, REPO, BRANCH, api=api)
    assert_published(hub, root, tmp_path)


@pytest.mark.slow
def test_without_a_hub(
    monkeypatch: pytest.MonkeyPatch, make_dataset: MakeDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_dataset(tmp_path / "a")
    with socket.socket() as probe:  # leaves a closed port
        probe.bind(("127.0.0.1", 0))
        api = HfApi(endpoint=f"http://127.0.0.1:{probe.getsockname()[1]}", token="hf_alice")
    with pytest.raises(HubError, match=r"Connection refused.*rerun the command of its job"):
        publish(root, REPO, BRANCH, api=api)
    caplog.clear()
    require_access(REPO, api=api)
    assert "could not be checked" in caplog.text and "Connection refused" in caplog.text
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for attempt in (lambda: publish(root, REPO, BRANCH, api=api), lambda: require_access(REPO, api=api)):
        with pytest.raises(HubError, match="unset HF_HUB_OFFLINE"):
            attempt()


def test_login(hub: FakeHub, api: HfApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    require_access(REPO, api=api)
    with pytest.raises(HubError, match=r"there is no token.*leave output\.hf_repo_id out"):
        require_access(REPO)
    with pytest.raises(HubError, match=r"refuses the token.*To capture without publishing") as caught:
        require_access(REPO, api=HfApi(endpoint=hub.url, token="hf_mallory"))
    assert "mallory" not in str(caught.value)
    hub.roles["hf_alice"] = "read"
    with pytest.raises(HubError, match="may only read"):
        require_access(REPO, api=api)
    assert caplog.records == []
    hub.fault("GET", "/whoami", status=429)
    require_access(REPO, api=api)
    assert "could not be checked" in caplog.text and caplog.records[0].levelno == logging.WARNING
    assert huggingface_hub.get_token() is None


def test_access_is_checked_before_a_job(hub: FakeHub, api: HfApi) -> None:
    with pytest.raises(
        HubError, match=r"could not be published to bob/x: the login is that of alice, .* of alice, lab\."
    ):
        require_access("bob/x", api=api)
    require_access("lab/x", private=True, api=api)
    hub.create(REPO)
    require_access(REPO, api=api)
    with pytest.raises(HubError, match=r"output\.private=true, but the repository exists and is public"):
        require_access(REPO, private=True, api=api)
    hub.repositories[REPO].private = True
    require_access(REPO, private=True, api=api)


def test_a_stored_login_will_do(
    hub: FakeHub, endpoint: str, make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("hf_alice")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    require_access(REPO)
    root = make_dataset(tmp_path / "a")
    publish(root, REPO, BRANCH)
    assert_published(hub, root, tmp_path)
