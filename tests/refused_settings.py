"""What is wrong with a config file, as the tests of settings that do not go together ask for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import ConfigError
from trainers.run_config import load_run_config


def problems_of(text: str, folder: Path) -> list[str]:
    """Return the lines with which a config file is refused, its path cut to its name; it must be."""
    path = folder / "a.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_run_config([path])
    return [problem.replace(str(path), "a.toml") for problem in refused.value.problems]
