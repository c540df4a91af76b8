"""The judge of "already gone", on errors as they really arrive: bare, wrapped, grouped, and impostors."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from penstock.core.deadlines import DeadlinePassed
from penstock.model.errors import Internal
from penstock.node.linux.absent import is_absent
from penstock.node.linux.netlink import NetlinkError


def caught(work: object) -> BaseException:
    try:
        work()  # type: ignore[operator]
    except BaseException as error:
        return error
    raise AssertionError("it did not fail")


def wrapped(cause: BaseException) -> BaseException:
    def work() -> None:
        raise Internal("slot could not be destroyed", which="14") from cause

    return caught(work)


GONE = FileNotFoundError(errno.ENOENT, "gone")
BUSY = OSError(errno.EBUSY, "busy")


def test_real_absences_of_files_and_processes(tmp_path: Path) -> None:
    assert is_absent(caught(lambda: os.rmdir(tmp_path / "none")))
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(pid, 0)
    assert is_absent(caught(lambda: os.kill(pid, 9)))


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.ENXIO, errno.EADDRNOTAVAIL])
def test_the_kernels_words_for_absent(number: int) -> None:
    assert is_absent(OSError(number, "x"))
    assert is_absent(NetlinkError(number, "link vs14: x"))


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EPERM, errno.EINVAL, errno.EIO, errno.ETIMEDOUT])
def test_everything_else_is_not(number: int) -> None:
    assert not is_absent(OSError(number, "x"))


def test_a_wrapper_is_judged_by_its_cause() -> None:
    assert is_absent(wrapped(GONE))
    assert is_absent(wrapped(wrapped(GONE)))
    assert not is_absent(wrapped(BUSY))


def test_an_os_error_is_judged_by_its_own_number_whatever_caused_it() -> None:
    def work() -> None:
        raise OSError(errno.EBUSY, "still mounted") from GONE

    assert not is_absent(caught(work))


def test_what_was_merely_being_handled_proves_nothing() -> None:
    def work() -> None:
        try:
            raise GONE
        except FileNotFoundError:
            raise Internal("something else went wrong")  # noqa: B904 - an implicit context is the point

    error = caught(work)
    assert error.__context__ is GONE
    assert not is_absent(error)


def test_a_group_is_absent_only_as_a_whole() -> None:
    assert is_absent(ExceptionGroup("undo", [GONE, wrapped(ProcessLookupError(errno.ESRCH, "no such process"))]))
    assert is_absent(ExceptionGroup("undo", [ExceptionGroup("nested", [GONE])]))
    assert not is_absent(ExceptionGroup("undo", [GONE, BUSY]))
    assert not is_absent(ExceptionGroup("undo", [GONE, ExceptionGroup("nested", [wrapped(BUSY)])]))
    assert not is_absent(BaseExceptionGroup("undo", [GONE, asyncio.CancelledError()]))


def test_a_group_as_the_cause() -> None:
    assert is_absent(wrapped(ExceptionGroup("undo", [GONE])))
    assert not is_absent(wrapped(ExceptionGroup("undo", [GONE, BUSY])))


def test_impostors() -> None:
    assert not is_absent(None)
    assert not is_absent(KeyError("ENOENT"))
    assert not is_absent(Internal("No such file or directory"))
    assert not is_absent(OSError("No such file or directory"))  # no number
    assert not is_absent(DeadlinePassed("end of link vs14", within_s=1))  # an OSError too, of no number


def test_a_chain_that_bites_its_tail_ends() -> None:
    one, two = Internal("one"), Internal("two")
    one.__cause__, two.__cause__ = two, one
    assert not is_absent(one)
