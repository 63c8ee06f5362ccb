"""Tensor operations with one signature and several implementations; nothing of vtprune is imported here."""


def _step_aside() -> bool:
    """Put Hugging Face's `kernels` in our place, if it is installed and this folder was found under its name.

    Started from the repository root, Python finds this folder first, and transformers imports that package.
    """
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    theirs = PathFinder.find_spec("kernels", [p for p in sys.path if Path(p).resolve() != root])
    if theirs is None or theirs.loader is None:
        return False
    sys.modules["kernels"] = module_from_spec(theirs)
    theirs.loader.exec_module(sys.modules["kernels"])
    return True


if __name__ != "kernels" or not _step_aside():
    from .attention import attention_received, attention_rows
    from .compact import Compacted, compact
    from .dispatch import best_few, best_first, full_precision, recorded, recording, use
    from .dpp_greedy import dpp_greedy
    from .facility_greedy import facility_greedy
    from .farthest_point import farthest_point
    from .host import DeferredChecks, HostCopy, check, check_finite, check_rows_finite, deferring, each, to_device
    from .merge import merge
    from .page_rank import page_rank
    from .volume_coverage import volume_coverage

    __all__ = [
        "Compacted",
        "DeferredChecks",
        "HostCopy",
        "attention_received",
        "attention_rows",
        "best_few",
        "best_first",
        "check",
        "check_finite",
        "check_rows_finite",
        "compact",
        "deferring",
        "dpp_greedy",
        "each",
        "facility_greedy",
        "farthest_point",
        "full_precision",
        "merge",
        "page_rank",
        "recorded",
        "recording",
        "to_device",
        "use",
        "volume_coverage",
    ]
