"""`python -m vlmo_ray` is the `vlmo` command."""

from vlmo_ray.cli import main

if __name__ == "__main__":
    main()
