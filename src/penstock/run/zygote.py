"""The zygote's process: imports the guest, then clones sandboxes for ever. Started detached by `up`.

    python -I -m penstock.run.zygote DATA

Everything a guest will ever need must be imported here: after this process has entered its bare root, no module can be
found any more. It reads no secret of the data folder.
"""

from __future__ import annotations

import sys

from penstock.guest.main import serve
from penstock.guest.rehearsal import rehearse
from penstock.node.linux import zygote
from penstock.run.children import announce
from penstock.run.datafolder import DataFolder


def main(arguments: list[str]) -> None:
    folder = DataFolder(arguments[0])
    rehearse(str(folder.run))
    listener = zygote.listen(str(folder.zygote_socket))
    announce(folder.zygote_file)
    zygote.run(listener, serve, stepping_stone=str(folder.run))


if __name__ == "__main__":
    main(sys.argv[1:])
