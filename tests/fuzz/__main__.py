"""Runs all fuzzing: ``python -m tests.fuzz``, from the top of the repository. Takes about 25 minutes on two cores.

Prints the counts of each kind. Exit status 1 if there were failures: tracebacks, hangs, wrong successes, wrong responses.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz import configs, converting, http, weights

#: What is run: the cases, and the most seconds.
KINDS = {
    "configs": (configs.run, 1300, 500.0),
    "weights": (weights.run, 900, 300.0),
    "converting": (converting.run, 300, 500.0),
    "http": (http.run, 5000, 1500.0),
}
#: Counts that are failures, for the fuzzing that does not sum them up.
FAILURES = ("CRASH", "HANG", "WRONG", "LOST")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="what to run (default: everything)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="share of the cases (default %(default)s)")
    arguments = parser.parse_args()
    failures = 0
    for kind in arguments.kinds or KINDS:
        run, count, seconds = KINDS[kind]
        started = time.monotonic()
        counts = run(arguments.seed, max(1, round(count * arguments.share)), seconds)
        failures += counts["failures"] or sum(counts[name] for name in FAILURES)
        print(f"{kind}: {dict(counts)} in {time.monotonic() - started:.0f} s", flush=True)
    print(f"failures: {failures}")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
