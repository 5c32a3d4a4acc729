"""Results of runs in a file, to which each run is added as it ends: a stopped command goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]


class Kept:
    """The runs in ``results.json`` of a folder, all by one recipe.

    Raises:
        ValueError: If those in it are by another recipe.
    """

    def __init__(self, folder: Path, recipe: Result) -> None:
        self._file, self._recipe = folder / "results.json", recipe
        self.results: list[Result] = []
        folder.mkdir(parents=True, exist_ok=True)
        if self._file.is_file():
            kept = json.loads(self._file.read_text())
            if kept["recipe"] != recipe:
                raise ValueError(f"{self._file} is by {kept['recipe']}, not by {recipe}")
            self.results = kept["results"]

    def of(self, case: Result, run: Callable[[], Result]) -> Result:
        """The run of a case: that in the file, else a new one.

        Args:
            case: What tells it from all others.
            run: Gives its other results.
        """
        for result in self.results:
            if case.items() <= result.items():
                return result
        self.results.append({**case, **run()})
        part = self._file.with_suffix(".part")
        text = json.dumps({"recipe": self._recipe, "results": self.results}, indent=1)
        part.write_text(text + "\n")
        part.replace(self._file)
        return self.results[-1]
