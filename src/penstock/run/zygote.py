"""The zygote's process: makes a guest up to the point where it would be somebody's, then clones it for ever. Started
detached by `up`.

    python -I -m penstock.run.zygote DATA

Everything a guest will ever need must be imported here: after this process has entered its bare root, no module can be
found any more. It reads no secret of the data folder.
"""

from __future__ import annotations

import os
import sys


def main(arguments: list[str]) -> None:
    _take_no_fork_handlers()
    from penstock.guest.main import Unborn
    from penstock.guest.rehearsal import rehearse
    from penstock.node.linux import zygote
    from penstock.run.children import announce
    from penstock.run.datafolder import DataFolder

    folder = DataFolder(arguments[0])
    rehearse(str(folder.run))
    unborn = Unborn()
    listener = zygote.listen(str(folder.zygote_socket))
    announce(folder.zygote_file)
    zygote.run(listener, unborn.serve, stepping_stone=str(folder.run))


def _take_no_fork_handlers() -> None:
    """Modules imported from here on have nothing to run after a fork.

    `threading`, `logging` and `concurrent.futures` would put locks right that another thread may hold: here is none.
    `random` would seed itself anew, but a guest takes its chances from the kernel. In each sandbox that is 150 pages.
    """
    os.register_at_fork = lambda **_: None


if __name__ == "__main__":
    main(sys.argv[1:])
