"""Published settings by name: `ptv2 train --preset rte-roberta-large`, and published searches as grids for `ptv2 ablate`.

One YAML file a script of the published code, presets/<dataset>-<backbone>.yaml: its keys are flags of ptv2 train, its first
line is its summary. Flags that are given beside a preset win over it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptv2_engine.errors import ConfigError, did_you_mean

FOLDER = Path(__file__).parent / "presets"
GRIDS = FOLDER / "grids"


def list_presets() -> list[tuple[str, str]]:
    """(name, one-line summary) of every preset, by name."""
    return [(path.stem, _summary(path)) for path in sorted(FOLDER.glob("*.yaml"))]


def list_grids() -> list[tuple[str, str]]:
    """(name, one-line summary) of every packaged grid, by name."""
    return [(path.stem, _summary(path)) for path in sorted(GRIDS.glob("*.yaml"))]


def load_preset(name: str) -> dict[str, list[str]]:
    """Flag name -> values as strings, what `--name value ...` would say. Raises ConfigError for a name there is not."""
    known = [name for name, _ in list_presets()]
    if name not in known:
        raise ConfigError(f"--preset {name!r} does not exist{did_you_mean(name.lower(), known)}")
    return flags_of(read_yaml(FOLDER / f"{name}.yaml", "--preset"), f"--preset {name}")


def find_grid(name: str) -> Path:
    """The file that --grid names: a path, or a packaged grid. Raises ConfigError."""
    if Path(name).is_file():
        return Path(name)
    packaged = GRIDS / f"{name}.yaml"
    if Path(name).name != name or not packaged.is_file():
        raise ConfigError(f"--grid {name} does not exist; pass a YAML file, or the name of a packaged grid "
                          f"({', '.join(grid for grid, _ in list_grids())}).")
    return packaged


def read_yaml(path: str | Path, flag: str) -> dict[str, Any]:
    """The mapping a YAML file holds; `flag` is what named it, for messages. Raises ConfigError.

    Only true and false are booleans, as in YAML 1.2: `save_strategy: no` means the word.
    """
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {letter: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":bool")]
                                   for letter, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    if not Path(path).is_file():
        raise ConfigError(f"{flag} {path} does not exist; check the path.")
    try:
        loaded = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path} is not valid YAML ({str(error).splitlines()[0]}); correct it.") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{flag} {path} must hold keys and values, such as 'learning_rate: 5e-3'.")
    return {str(key).replace("-", "_"): value for key, value in loaded.items()}


def flags_of(loaded: dict[str, Any], said: str) -> dict[str, list[str]]:
    """A YAML mapping as command-line words: a list is several values, null leaves the flag out. Raises ConfigError."""
    for name, value in loaded.items():
        if isinstance(value, dict):
            raise ConfigError(f"{said}: {name} holds a mapping, but a flag takes one value or a list; write it flat.")
    return {name: words_of(value) for name, value in loaded.items() if value is not None}


def words_of(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]


def _summary(path: Path) -> str:
    with open(path, encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()
