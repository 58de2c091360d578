"""`python -m flexure`: the command line."""

from flexure.cli import main

if __name__ == "__main__":
    main()
