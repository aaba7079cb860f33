"""`qk_sniffer.capture` is a package that can be called: help shows the function that it calls."""

import inspect
import pydoc
from collections.abc import Callable

import pytest

import qk_sniffer
from qk_sniffer.notebook.captured import capture


def test_the_signature_is_that_of_the_function() -> None:
    assert inspect.signature(qk_sniffer.capture) == inspect.signature(capture)


@pytest.mark.parametrize(("function", "argument"), [(qk_sniffer.capture, "model"), (qk_sniffer.export, "dataset")])
def test_a_call_without_its_first_argument_names_the_function(function: Callable[..., object], argument: str) -> None:
    with pytest.raises(TypeError, match=rf"^{function.__name__.rpartition('.')[2]}\(\) missing .*'{argument}'"):
        function()


def test_help_shows_the_arguments_and_their_meaning() -> None:
    shown = pydoc.render_doc(qk_sniffer.capture, renderer=pydoc.plaintext)
    assert "capture(model: torch.nn.modules.module.Module, *, layers:" in shown
    for line in (inspect.getdoc(capture) or "").splitlines():
        assert line in shown


@pytest.mark.slow  # make slow installs IPython with the notebooks
def test_ipython_shows_the_arguments_and_their_meaning() -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell(user_ns={"qk_sniffer": qk_sniffer})
    shown = shell.object_inspect_text("qk_sniffer.capture")
    assert "kinds: collections.abc.Iterable[str] = 'qk'" in shown
    assert "max_rows: the most rows to keep in memory" in shown
