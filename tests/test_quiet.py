"""A library user's process stays as it is; what `quiet_libraries` changes can be undone."""

import logging
import os
import socket
import warnings

import diffusers
import pytest
import transformers

from dte_lab.common.quiet import quiet_libraries
from dte_lab.hardware.doctor import examine

LOGS = [diffusers.utils.logging, transformers.utils.logging]


def state():
    """What belongs to the whole process."""
    return (
        warnings.showwarning,
        list(warnings.filters),
        dict(os.environ),
        list(logging.getLogger().handlers),
        [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in LOGS],
    )


@pytest.fixture(autouse=True)
def talkative(monkeypatch):
    """Libraries that say everything, whatever other tests have left."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in LOGS]
    for log in LOGS:
        log.set_verbosity_info()
        log.enable_progress_bar()
    yield
    for log, (verbosity, bar) in zip(LOGS, before, strict=True):
        log.set_verbosity(verbosity)
        (log.enable_progress_bar if bar else log.disable_progress_bar)()


def test_the_libraries_are_silent_until_it_ends(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest has some of its own
    before = state()
    with quiet_libraries():
        for log in LOGS:
            log.get_logger(log.__name__).warning("a notice of theirs")
        warnings.warn_explicit("theirs", UserWarning, "x.py", 1, module="torch.nn.modules")
        warnings.warn("ours", stacklevel=1)
        logging.getLogger("dte_lab").warning("logged")
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
        assert not any(log.is_progress_bar_enabled() for log in LOGS)
    assert capsys.readouterr().err.splitlines() == ["warning: ours", "warning: logged"]
    assert state() == before


def test_close_undoes_a_call_and_calls_may_be_nested(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    before = state()
    outer = quiet_libraries()
    inside = state()
    assert inside != before and os.environ["TOKENIZERS_PARALLELISM"] == "true"
    quiet_libraries().close()
    assert state() == inside
    outer.close()
    assert state() == before


def test_a_library_user_keeps_everything_and_needs_no_network(monkeypatch, tiny_path, picture):
    """Loading, learning and drawing from Python, and the doctor's findings."""
    from dte_lab import DTEPipeline

    def network(*arguments):
        raise AssertionError("a backbone on the disk was asked of the network")

    monkeypatch.setattr(socket.socket, "connect", network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    before = state()
    pipe = DTEPipeline.from_pretrained(tiny_path)
    concept = pipe.personalize(picture, num_steps=1, progress=False)
    pipe.generate(concept, ["S*"], num_inference_steps=1, progress=False)
    list(examine(tiny_path, device="cpu"))
    assert state() == before
