"""`python -m launcher` is `megascale`."""

from launcher.cli import main

main()
