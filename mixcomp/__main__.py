"""``python -m mixcomp``."""

from mixcomp.cli import main

if __name__ == "__main__":
    main()
