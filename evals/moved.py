"""Old import paths go on working: `vtprune.evals.bench` is `vtprune.evals.speed.bench`, the very same module."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

_ROOMS = {
    "accuracy": ("marking", "vit", "vit_data", "vit_search"),
    "speed": (
        *("bench", "bench_attention", "bench_hooks", "bench_kernels", "bench_parts", "bench_selection", "bench_video"),
        *("flops", "geometries", "meter", "prefill"),
    ),
}
# Old name -> name of today, both inside vtprune.evals; what lies in a folder that moved has moved with it.
MOVED = {
    **{f"tiny.{name}": f"toys.{name}" for name in ("drawing", "muon", "trainer")},
    "tiny": "toys.image",
    "tiny_video": "toys.video",
    **{name: f"{room}.{name}" for room, names in _ROOMS.items() for name in names},
}
_HERE = __package__ + "."


class OldNames(MetaPathFinder, InspectLoader):
    """Answers imports of old names with the modules that they are now; any other name is left alone."""

    @classmethod
    def install(cls) -> None:
        """Look here first: the folders of a module that moved would give its parts a second life under the old name."""
        if not any(isinstance(finder, cls) for finder in sys.meta_path):
            sys.meta_path.insert(0, cls())

    @staticmethod
    def new_name(name: str) -> str | None:
        """The name of today, None if `name` is no old one."""
        if name.startswith(_HERE):
            inside = name[len(_HERE) :]
            for old, new in MOVED.items():
                if inside == old or inside.startswith(f"{old}."):
                    return f"{_HERE}{new}{inside[len(old) :]}"
        return None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = self.new_name(fullname)
        found = importlib.util.find_spec(new) if new else None
        if found is None:
            return None
        inside = found.submodule_search_locations
        return importlib.util.spec_from_loader(fullname, self, is_package=bool(inside))

    def exec_module(self, module: ModuleType) -> None:
        """Put today's module in the place of the empty one that the import system made."""
        sys.modules[module.__name__] = importlib.import_module(self.new_name(module.__name__) or "")

    def get_code(self, fullname: str) -> CodeType | None:
        """For `python -m` with an old name."""
        found = importlib.util.find_spec(self.new_name(fullname) or "")
        assert found is not None
        assert isinstance(found.loader, InspectLoader)
        return found.loader.get_code(found.name)

    def get_source(self, fullname: str) -> str | None:
        return None
