"""The recipes and studies that come with the engine, as files: found without reading any."""

from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"
STUDIES = Path(__file__).parent / "studies"


def recipe_paths() -> dict[str, Path]:
    """The recipes that come with the engine, by name. Files named _*.yaml are no recipes of their own but bases."""
    found = {path.stem: path for path in RECIPES.rglob("*.yaml") if not path.name.startswith("_")}
    return dict(sorted(found.items()))


def recipe_names() -> list[str]:
    return list(recipe_paths())


def study_paths() -> dict[str, Path]:
    """The studies that come with the engine, by name."""
    return {path.stem: path for path in sorted(STUDIES.glob("*.yaml"))}
