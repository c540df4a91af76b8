"""`penstock doctor`: what this machine can do, and at last a real sandbox from end to end.

Exit code 0: everything that is needed works. Gaps that cost only a feature are shown with `!` and do not fail it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from penstock.cli.client import Client
from penstock.cli.profile import Profile
from penstock.cli.show import as_json, note
from penstock.run import doctor

MARKS: Final = {True: "ok", None: "!", False: "FAIL"}


def main(data: Path, *, json: bool) -> int:
    found = doctor.findings(data)
    if all(finding.ok is not False for finding in found):
        note("running a sandbox, from the API to its end …")
        found.append(doctor.a_sandbox(_use))
    if json:
        as_json([{"probe": f.probe, "ok": f.ok is not False, "found": f.found, "fix": f.fix} for f in found])
    else:
        for finding in found:
            print(f"{MARKS[finding.ok]:5} {finding.probe:16} {finding.found}")
            if finding.fix and finding.ok is not True:
                print(f"{'':22} → {finding.fix}")
    return 1 if any(finding.ok is False for finding in found) else 0


def _use(api_url: str, sandbox_url: str, api_key: str) -> str:
    """Create, run /bin/true, kill; how long each took."""
    with Client(Profile(api_url, sandbox_url, api_key)) as client:
        began = time.perf_counter()
        made = client.call("POST", "/v2/sandboxes", json={"templateID": "base", "timeout": 60}).json()
        ready = time.perf_counter()
        message = {"process": {"cmd": "/bin/true"}, "stdin": False}
        ended = [event["end"] for event in client.start(made, message, None) if "end" in event]
        ran = time.perf_counter()
        client.call("DELETE", f"/sandboxes/{made['sandboxID']}")
        gone = time.perf_counter()
    if not ended or ended[0].get("exitCode", 0):
        raise RuntimeError(f"/bin/true ended with {ended}")
    times = {"create": ready - began, "exec": ran - ready, "kill": gone - ran}
    return ", ".join(f"{name} {took * 1000:.0f} ms" for name, took in times.items())
