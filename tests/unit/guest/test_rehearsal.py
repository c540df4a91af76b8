"""The rehearsal in the zygote: it plays real calls, and leaves nothing that a sandbox could inherit."""

from __future__ import annotations

import gc
import os
import resource
import signal
from pathlib import Path

import pytest

from penstock.guest import rehearsal


def test_a_rehearsal_leaves_no_descriptor_file_handler_or_limit_behind(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40)  # longer than a socket's address
    folder.mkdir()
    gc.collect()  # what earlier tests of this process left to the collector is not the rehearsal's to close
    before = (sorted(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE))
    handlers = [signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGTERM)]
    rehearsal.rehearse(str(folder))
    assert (sorted(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)) == before
    assert [signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGTERM)] == handlers
    assert not list(folder.iterdir())


def test_its_calls_are_answered_as_in_a_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[bytes] = []
    monkeypatch.setattr(rehearsal, "ROUNDS", 1)
    monkeypatch.setattr(rehearsal, "_heard", answers.append)
    rehearsal.rehearse(str(tmp_path))
    heads = [answer.split(b"\r\n", 1)[0] for answer in answers]
    assert heads == [b"HTTP/1.1 204 No Content", b"HTTP/1.1 200 OK", b"HTTP/1.1 200 OK"]
    assert b"not_found" in answers[2]
