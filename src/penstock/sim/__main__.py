"""`python -m penstock.sim --seed N` plays one world and prints its trace; `--seeds COUNT` plays many and stops at the
first that breaks."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Final

from penstock.sim import traffic, world
from penstock.sim.world import Outcome

SEEDS_DEFAULT: Final = 200


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m penstock.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="play this world only, and print its outcome")
    parser.add_argument("--seeds", type=int, default=SEEDS_DEFAULT, help="play worlds FIRST to FIRST+SEEDS-1")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--traffic", action="store_true", help="with ingress, guests and people who use them")
    parser.add_argument("--quiet", action="store_true", help="one line at the end")
    asked = parser.parse_args(argv)
    seeds = [asked.seed] if asked.seed is not None else range(asked.first, asked.first + asked.seeds)
    run = traffic.run if asked.traffic else world.run
    began = time.monotonic()
    played = 0
    for seed in seeds:
        try:
            outcome = run(seed)
        except BaseException as error:
            print(f"world {seed} broke: {error!r}", file=sys.stderr)
            for note in getattr(error, "__notes__", ()):
                print(note, file=sys.stderr)
            return 1
        played += 1
        if not asked.quiet:
            print(_line(outcome))
    took_s = time.monotonic() - began
    print(f"{played} worlds held in {took_s:.1f} s")
    return 0


def _line(outcome: Outcome) -> str:
    answers = " ".join(f"{word}={count}" for word, count in sorted(outcome.answers.items()))
    return (
        f"seed {outcome.seed:6d}  {outcome.digest[:16]}  {outcome.lines:5d} lines  {outcome.virtual_s:7.1f} s  "
        f"{outcome.crashes} crashes  {answers}"
    )


if __name__ == "__main__":
    sys.exit(main())
