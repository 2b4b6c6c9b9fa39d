"""`python -m app.cli`: the same as `veritune`."""

from app.cli import main

main()
