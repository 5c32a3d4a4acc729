"""``python -m neq COMMAND``."""

import argparse

from neq import doctor, report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m neq")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor.add_command(commands)
    report.add_command(commands)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
