"""`python -m fastvit_engine` is the `fastvit` command."""

from fastvit_engine.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
