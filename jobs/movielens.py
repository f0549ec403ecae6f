"""Downloads MovieLens data and converts them to input files: `python -m jobs.movielens NAME [--archive PATH] [--out
DIR] [--overwrite]`."""

import argparse
import sys

from bert4rec.data import movielens
from bert4rec.errors import InputError


def main() -> int:
    """Parse the arguments and provide the data. Print an error as one line."""
    args = _parser().parse_args()
    try:
        movielens.provide(args.name, args.archive, args.out, args.overwrite)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.movielens", description="Get MovieLens data as input files.")
    parser.add_argument("name", choices=movielens.NAMES, help="the data set")
    parser.add_argument("--archive", help="a zip or unpacked directory (default: data/NAME.zip, else a download)")
    parser.add_argument("--out", help="directory to write (default: data/NAME)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    return parser


if __name__ == "__main__":
    sys.exit(main())
