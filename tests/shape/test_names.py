"""Files are nouns or verbs of the domain: `ls` teaches the product."""

from __future__ import annotations

from pathlib import PurePosixPath

from .source import modules, modules_of_tests, report

BANNED = {
    "util", "utils", "helper", "helpers", "common", "misc", "manager", "managers", "handler", "handlers", "base",
    "core", "lib", "stuff", "shared", "tools", "types", "constants", "impl", "abstract", "interfaces", "generic",
}  # fmt: skip
ALLOWED = {"node/linux/base.py", "tests/linux/test_base.py"}  # the template named `base`


def test_no_module_has_a_name_that_says_nothing() -> None:
    report(
        (
            f"{module.at(1)}: the name says nothing of the product"
            for module in (*modules(), *modules_of_tests())
            if PurePosixPath(module.at(1).partition(":")[0]).stem.removeprefix("test_") in BANNED
            and module.at(1).partition(":")[0].removeprefix("src/penstock/") not in ALLOWED
        ),
        "Name the noun it is about. What serves one caller lives with that caller; what serves many earned a noun.",
    )
