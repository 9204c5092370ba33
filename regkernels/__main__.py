"""``python -m regkernels``: versions, what was compiled, devices; ``--json`` for a bug report."""

from __future__ import annotations

import argparse
import json

from regkernels.info import describe


def main() -> None:
    """Print what `regkernels.info.describe` finds."""
    parser = argparse.ArgumentParser(prog="python -m regkernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="as a JSON object")
    as_json = parser.parse_args().json
    facts = describe()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
