"""`python -m audiotok` is the command `audiotok`."""

from audiotok.cli import main

if __name__ == "__main__":
    main()
